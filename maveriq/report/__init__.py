"""What a run leaves: metrics, verdict, run folders, tables, the live view."""
