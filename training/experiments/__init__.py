"""The published experiments, repeated: recurrent against baseline under one protocol, with the spread over seeds."""
