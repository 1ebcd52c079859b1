"""What goes to a tracking store: kept on disk, in order, sent once the store takes it."""
