"""Load test: drives the service over HTTP alone and compares the recurrent model with the baseline."""
