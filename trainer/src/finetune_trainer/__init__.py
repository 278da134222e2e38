"""The stages of a FineTuneJob as programs; `contract` is what the operator shares with them."""
