"""The two forms of a message: pairs of value and index, and every element in few bits."""
