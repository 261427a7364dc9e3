"""What a run is turned into: a merged model, a model card."""
