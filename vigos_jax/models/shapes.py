"""The words of array annotations: `Float[Array, "B T D"]` has a floating dtype and three axes.

B batch, T tokens, S cache slots or patch slots, P patches, M visual tokens, D model, N query heads, K key/value heads,
H head size, F features, V vocabulary, L layers, E supervised tokens, R roles. Within one call a letter is one number.
Nothing checks them while the program runs; the tests do, at every call.
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Num

AnyArray = jax.Array | np.ndarray
# A function of arrays is written for jax's, and given numpy's it works as well: jax converts them.
if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = AnyArray

__all__ = ["AnyArray", "Array", "Bool", "Float", "Int", "Key", "Num"]
