"""Turns a run into a merged model, with a proof and a model card."""
