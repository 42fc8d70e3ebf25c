"""The operations, besides `+ - *`, that an algorithm's math may use, and what they mean.

Algorithms import this module as `xp`. This torch version is the definition and serves the eager backend; a backend that compiles the
math binds `xp` to its own module with the same names. All are correctly rounded (IEEE 754), which is what makes backends bitwise equal.
"""

from torch import divide, maximum, sqrt, where

__all__ = ["divide", "maximum", "sqrt", "where"]
