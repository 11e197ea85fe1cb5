"""The report of a run: one page that opens from disk, the JSON that it is made of, and the same graph for Google's Model Explorer."""
