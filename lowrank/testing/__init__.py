"""Does an adapter class keep its promises? The contract as properties, tried on small models.

assert_conforms(MyAdapter, r=4)                     in a test: AssertionError with the table where one fails
conformance(MyAdapter, r=4) → Conformance           the table itself
lowrank check my_package.my_adapter:MyAdapter r=4   the same from the command line
"""

from lowrank.testing.conformance import Conformance, Row, assert_conforms, conformance
from lowrank.testing.options import options_of

__all__ = ["Conformance", "Row", "assert_conforms", "conformance", "options_of"]
