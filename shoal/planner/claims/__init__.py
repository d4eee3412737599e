"""The published claims about size, cost, serving, network and energy, each recomputed here or said in words why it cannot be."""
