"""Which URLs are reached out to: inside addresses in every spelling, ports, user names, what parsers disagree about."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photogram.core.errors import ConfigError
from photogram.net.address import AllowedHosts, Target, UrlRefused, is_public, join, parse_url

NOBODY = AllowedHosts()

INSIDE = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7",
    "203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808",
    "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "100::1", "3fff::1", "5f00::1",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1"]


@pytest.mark.parametrize("address", INSIDE)
def test_inside_addresses_are_refused_as_they_are_and_in_urls(address):
    assert not is_public(address)
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(UrlRefused) as raised:
        parse_url(f"http://{host}/a.png", NOBODY, "url")
    assert (raised.value.param, raised.value.code, raised.value.status) == ("url", "url_not_allowed", 400)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_reached(address):
    assert is_public(address)
    host = f"[{address}]" if ":" in address else address
    assert parse_url(f"https://{host}/a.png", NOBODY, "url").host == address


@pytest.mark.parametrize(
    "url",
    [
        # 127.0.0.1 as other readers take it
        "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/", "http://0177.0.0.1/", "http://127.1/",
        "http://127.0.0.1./", "http://017700000001/", "http://0/", "http://0x/", "http://127.0.0.01/",
        "http://1.2.3.4.5/", "http://a.127.1/", "http://①②⑦.⓪.⓪.①/", "http://[::ffff:7f00:1]/", "http://[fe80::1%25eth0]/",
        # another scheme
        "file:///etc/passwd", "gopher://8.8.8.8/", "ftp://example.com/a", "//example.com/a", "example.com/a",
        "jar:http://example.com!/", "data:text/plain,x", "",
        # user names, and hosts that parsers cut at different places
        "http://user@example.com/", "http://user:pass@example.com/", "http://example.com@127.0.0.1/",
        "http://127.0.0.1:80@example.com/", "http://example.com\\@127.0.0.1/", "http://example.com#@127.0.0.1/x\n",
        "http://example.com\t/", "http://exa\r\nmple.com/", "http://example.com/\r\nHost: inside/", "http:///a.png",
        "http://exa mple.com/", "http://[::1", "http://::1/", "http://example.com:/", "http://exämple.com/",
        "http:/example.com/a.png", "http://example.com:80:80/",
        # ports of other services
        "http://example.com:22/", "http://example.com:25/", "http://example.com:6379/", "http://example.com:0/",
        "http://example.com:65536/", "http://example.com:99999/",
        "http://example.com/" + "a" * 9000,
    ],
)  # fmt: skip
def test_ambiguous_and_foreign_urls_are_refused(url):
    with pytest.raises(UrlRefused):
        parse_url(url, NOBODY, "url")


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://Example.COM", "http://example.com/"),
        ("HTTPS://example.com./a?b=c#d", "https://example.com/a?b=c"),
        ("https://example.com:8443/a b/é.png", "https://example.com:8443/a%20b/%C3%A9.png"),
        ("http://example.com?x=1", "http://example.com/?x=1"),
        ("http://xn--exmple-cua.com/%41", "http://xn--exmple-cua.com/%41"),
        ("http://example.com:80/", "http://example.com/"),
    ],
)
def test_ordinary_urls_keep_their_meaning(url, wanted):
    assert str(parse_url(url, NOBODY, "url")) == wanted


def test_permitted_hosts_are_exact():
    allowed = AllowedHosts.parse(["127.0.0.1:9000", "images.lan", "[::1]:8000"])
    for url in ("http://127.0.0.1:9000/", "http://IMAGES.lan/", "https://images.lan:8443/", "http://[::1]:8000/a"):
        parse_url(url, allowed, "url")
    for url in ("http://127.0.0.1/", "http://127.0.0.1:9001/", "http://images.lan:9000/", "http://[::1]:80/"):
        with pytest.raises(UrlRefused):
            parse_url(url, allowed, "url")


@pytest.mark.parametrize("text", ["", "http://images.lan", "images.lan/", "a:b", "a:0", "a:70000", "a b", "*"])
def test_a_permitted_host_that_is_none_is_a_configuration_error(text):
    with pytest.raises(ConfigError, match="--allow-url-host"):
        AllowedHosts.parse([text])


def test_redirects_are_checked_like_urls():
    base = parse_url("https://example.com/a/b.png", NOBODY, "url")
    assert str(join(base, "../c.png", NOBODY, "url")) == "https://example.com/c.png"
    assert str(join(base, "//other.example/x", NOBODY, "url")) == "https://other.example/x"
    for location in ("http://127.0.0.1/", "//169.254.169.254/latest", "file:///etc/passwd", "http://a@b/", "ftp://x/"):
        with pytest.raises(UrlRefused):
            join(base, location, NOBODY, "url")


@given(st.text(max_size=60) | st.from_regex(r"https?://[\[\]0-9a-fx:.@%\\/#?]{0,40}"))
def test_any_text_is_refused_or_understood_the_same_way_twice(url):
    try:
        target = parse_url(url, NOBODY, "url")
    except UrlRefused:
        return
    assert isinstance(target, Target)
    assert parse_url(str(target), NOBODY, "url") == target
    assert "@" not in target.authority
