"""`wastenot report`: one page about one run or several, in a file that opens without a network."""
