"""The token that the processes of a fleet share, and how they prove to each other that they have it.

Both sides of a connection do, with HMAC-SHA-256 over random numbers of both (after ISO/IEC 9798-4, mutual
authentication in three passes), so the token itself is never sent, and what is heard once is of no use again. A proof
says who may talk; it does not encrypt what is said. Pure but for reading the file; imports little, as heartbeat
processes need it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Literal

from spotjax.errors import ConfigError, TransportError

NONCE_BYTES, PROOF_BYTES = 32, 32
SHORTEST = 40
"""Characters: one that a person would think of could be guessed from a proof."""
STATUS_KEY = "status"
"""What the key is for by which workers ask their controller for its status."""
Side = Literal["caller", "called"]


class JoinToken:
    """The token, as the key of proofs."""

    def __init__(self, token: str) -> None:
        self._key = hashlib.sha256(b"spotjax join token\0" + token.encode()).digest()

    @classmethod
    def from_file(cls, path: str | Path) -> JoinToken:
        """The token of a file that ``spotjax keys join-token`` made.

        Raises:
          ConfigError: the file cannot be read, or what it has is too short to be one.
        """
        try:
            token = Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"join_token ({path}) cannot be read: {error}") from error
        if len(token) < SHORTEST:
            raise ConfigError(
                f"join_token ({path}) has {len(token)} characters, {SHORTEST} are the least: let spotjax keys "
                "join-token make one"
            )
        return cls(token)

    def proof(self, side: Side, purpose: bytes, caller_nonce: bytes, called_nonce: bytes) -> bytes:
        """That this side has the token.

        Args:
          side: who proves it.
          purpose: what the connection is for; a proof for one is none for another.
          caller_nonce, called_nonce: random numbers of both sides, ``NONCE_BYTES`` each.
        """
        return self._mac(b"proof", side.encode(), purpose, caller_nonce, called_nonce)

    def require(self, proof: bytes, side: Side, purpose: bytes, caller_nonce: bytes, called_nonce: bytes) -> None:
        """Raises TransportError unless it is that side's proof; takes the same time however wrong it is."""
        if not hmac.compare_digest(proof, self.proof(side, purpose, caller_nonce, called_nonce)):
            raise TransportError("the other side has another join token")

    def key_for(self, what: str) -> str:
        """A key that only those with the token can know, and from which nobody learns the token."""
        return self._mac(b"key", what.encode()).hex()

    def _mac(self, *parts: bytes) -> bytes:
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, message, "sha256")


class CallerHandshake:
    """The side that called, on a connection of bytes: sends ``hello``, receives ``ANSWER`` bytes, sends ``answer``."""

    ANSWER = NONCE_BYTES + PROOF_BYTES

    def __init__(self, token: JoinToken, purpose: bytes) -> None:
        self._token, self._purpose = token, purpose
        self.hello = secrets.token_bytes(NONCE_BYTES)

    def answer(self, received: bytes) -> bytes:
        """The proof of this side. Raises TransportError if the other side has another token."""
        nonce, proof = received[:NONCE_BYTES], received[NONCE_BYTES:]
        self._token.require(proof, "called", self._purpose, self.hello, nonce)
        return self._token.proof("caller", self._purpose, self.hello, nonce)


class CalledHandshake:
    """The side that was called: receives ``HELLO`` bytes, sends ``answer``, receives and checks ``PROOF`` bytes."""

    HELLO, PROOF = NONCE_BYTES, PROOF_BYTES

    def __init__(self, token: JoinToken, purpose: bytes) -> None:
        self._token, self._purpose = token, purpose
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._hello = b""

    def answer(self, hello: bytes) -> bytes:
        """This side's random number and proof."""
        self._hello = hello
        return self._nonce + self._token.proof("called", self._purpose, hello, self._nonce)

    def require(self, proof: bytes) -> None:
        """Raises TransportError unless the other side has the token."""
        self._token.require(proof, "caller", self._purpose, self._hello, self._nonce)
