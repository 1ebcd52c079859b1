"""What healing trains: one file per method, its first line what ``--help`` says."""
