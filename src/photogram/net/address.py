"""Which URLs and which network addresses a client may make this server talk to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from ..core.errors import ConfigError, RequestError

MAX_URL = 8192
PORTS = frozenset({80, 443, 8080, 8443})
"""Ports that any host may have; the others must be permitted with the host."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::(\d{1,5}))?", re.ASCII)
# What some resolvers read as an IPv4 address: decimal, octal and hexadecimal numbers in one to four parts.
_NUMERIC_HOST = re.compile(r"(?:.*\.)?(?:\d+|0x[0-9a-f]*)", re.ASCII)
_SAFE_IN_TARGET = "%/?:@!$&'()*+,;=-._~[]"

# Public unicast is what lies outside of these (IANA's special-purpose registries), and for IPv6 inside 2000::/3: so
# mapped (::ffff:0:0/96), compatible (::/96), NAT64 (64:ff9b::/96), unique local, link-local, site-local and multicast
# addresses are out without being named.
_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's platform services, at an address that looks public
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo's tunnels to IPv4 among them
        "2001:db8::/32",
        "2002::/16",  # 6to4: tunnels to IPv4
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)


class UrlRefused(RequestError):
    """A URL that this server does not reach out to."""

    code = "url_not_allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A checked http(s) URL. `host` is in lower case, an IPv6 address without brackets; `path` has the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Hosts that the operator permits whatever their addresses: with a port that one, without the usual ones."""

    pairs: frozenset[tuple[str, int | None]] = frozenset()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> AllowedHosts:
        """Read ``HOST`` and ``HOST:PORT``. Raises ConfigError for anything else."""
        pairs: set[tuple[str, int | None]] = set()
        for text in texts:
            match = _AUTHORITY.fullmatch(text)
            port = int(match.group(2)) if match and match.group(2) else None
            if match is None or port == 0 or (port or 0) > 65535:
                raise ConfigError(f"--allow-url-host '{text}': expected HOST or HOST:PORT, such as images.lan:8000.")
            pairs.add((_plain_host(match.group(1)), port))
        return cls(frozenset(pairs))

    def holds(self, host: str, port: int) -> bool:
        return (host, port) in self.pairs or (port in PORTS and (host, None) in self.pairs)


def parse_url(url: str, allowed: AllowedHosts, param: str) -> Target:
    """Return an http(s) URL in its parts. Raises UrlRefused, naming `param`, for one that is malformed, ambiguous or
    names an address or a port that is not reached out to.

    A host's name is not looked up here: `client` checks the addresses that it dials.
    """
    if len(url) > MAX_URL:
        raise UrlRefused(f"'{param}': the URL is longer than {MAX_URL} characters.", param=param)
    match = _URL.fullmatch(url)
    # Parsers disagree about control characters and backslashes, and what one checks another one would dial.
    if match is None or re.search(r"[\x00-\x1f\x7f\\]", url):
        raise UrlRefused(f"'{param}': not an http or https URL.", param=param)
    scheme, authority, rest = match.group(1).lower(), match.group(2), match.group(3)
    if "@" in authority:
        raise UrlRefused(f"'{param}': a URL with a user name or password is not fetched.", param=param)
    named = _AUTHORITY.fullmatch(authority)
    if named is None:
        raise UrlRefused(f"'{param}': the URL's host must be a name or an address in ASCII.", param=param)
    host = _plain_host(named.group(1))
    port = int(named.group(2)) if named.group(2) else _DEFAULT_PORTS[scheme]
    path = quote(rest if rest.startswith("/") else f"/{rest}", safe=_SAFE_IN_TARGET, errors="replace")
    if not allowed.holds(host, port):
        if port not in PORTS:
            raise UrlRefused(
                f"'{param}': port {port} is not allowed; only {', '.join(map(str, sorted(PORTS)))} are, or those that "
                "--allow-url-host names.",
                param=param,
            )
        _check_literal(host, param)
    return Target(scheme=scheme, host=host, port=port, path=path)


def join(base: Target, location: str, allowed: AllowedHosts, param: str) -> Target:
    """Return where a redirect leads, checked like any URL."""
    return parse_url(urljoin(str(base), location), allowed, param)


def is_public(address: str) -> bool:
    """Whether an IP address is public unicast: reachable by everybody, and nobody's inside."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv4Address):
        return not any(parsed in network for network in _SPECIAL_V4)
    return parsed.scope_id is None and parsed in _GLOBAL_V6 and not any(parsed in network for network in _SPECIAL_V6)


def no_public_address(host: str, param: str) -> UrlRefused:
    """The same words for a name that does not exist and one of an inside address: they are not told apart."""
    return UrlRefused(f"'{param}': host '{host}' has no public address.", param=param)


def _plain_host(text: str) -> str:
    return text.strip("[]").lower().removesuffix(".")


def _check_literal(host: str, param: str) -> None:
    """Refuse what is no name but an address: an inside one, or one written so that readers disagree about it."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not host or ":" in host or _NUMERIC_HOST.fullmatch(host):
            raise no_public_address(host, param) from None
        return
    if not is_public(host):
        raise no_public_address(host, param)
