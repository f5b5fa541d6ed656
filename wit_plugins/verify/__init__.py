"""A second opinion on a run: what it kept is computed again from the formula, with nothing of the code that trained.

Modules here import neither the tokens, nor the loss, nor the strategies of this project (an import contract holds it).
"""
