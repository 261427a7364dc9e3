"""`python -m lowvram_chat <command>`."""

from lowvram_chat.cli import main

raise SystemExit(main())
