"""Other frameworks' weight files <-> this project's checkpoints."""
