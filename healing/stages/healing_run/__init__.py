"""Parts of the ``heal`` stage: what it reads, and what its page shows."""
