"""What `import cmtool` offers, one module a verb: train, sample, edit, judge. Nothing here prints or writes unasked.

The package imports none of them: `find` and `train` answer mistakes without torch.
"""
