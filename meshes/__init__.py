"""The logical mesh (data, stage, tensor), and which part of which array belongs at each of its positions."""
