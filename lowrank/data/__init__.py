"""From files to token sequences: sources yield records, chat turns a record into tokens and a mask."""
