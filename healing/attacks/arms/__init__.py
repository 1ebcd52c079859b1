"""One file per arm; the file's name is the arm's, its first line what ``--help`` says."""
