"""Published ways to decide what each step computes, read from the files of their authors: one kind of schedule each."""
