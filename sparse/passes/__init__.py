"""One pass a file; the file's name is the word of the recipe."""
