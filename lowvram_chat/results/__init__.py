"""Results of benchmarks: kept in files, compared, and shown."""
