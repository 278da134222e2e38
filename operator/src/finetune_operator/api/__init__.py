"""The FineTuneJob resource: names, typed spec and status, parsing, conditions, and the CRD made from them. Pure."""
