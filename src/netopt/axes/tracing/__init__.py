"""One forward, traced: its dimensions, its sizes, the integers a model holds."""
