//! One scalar into one value: `None` is "not what was expected".

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use super::Protocol;

/// Most bytes of a key file that are read; more is an error, not a longer key.
pub(super) const MAX_KEY_BYTES: u64 = 4096;
/// Fewest bytes of a cluster key: the output of SHA-256, as RFC 2104 section 3 advises.
pub(super) const MIN_KEY_BYTES: usize = 32;

/// `10ms`, `2h`: a number always has its unit.
pub(super) fn duration(text: &str) -> Option<Duration> {
    humantime::parse_duration(text).ok()
}

/// `64KiB`, `256MiB`, `1GiB`, in bytes.
pub(super) fn size(text: &str) -> Option<u64> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30)];
    let (number, shift) = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))?;
    whole::<u64>(number)?.checked_mul(1 << shift)
}

/// A decimal number without a sign.
pub(super) fn whole<T: std::str::FromStr>(text: &str) -> Option<T> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

/// `192.168.1.100/24`: an address that a host can have in a subnet with room for three.
pub(super) fn virtual_ip(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix_len) = text.split_once('/')?;
    let address: Ipv4Addr = address.parse().ok()?;
    let prefix_len: u8 = whole(prefix_len)?;
    let unicast = !(address.is_loopback() || address.is_multicast())
        && address.octets()[0] != 0
        && address.octets()[0] < 240;
    let host = (1..=30).contains(&prefix_len) && is_host(address, address, prefix_len);
    (unicast && host).then_some((address, prefix_len))
}

/// Whether `address` is a host's in the subnet of `other`: inside, neither the network's own address
/// nor the broadcast address (RFC 922). `prefix_len` is 1–30.
pub(super) fn is_host(address: Ipv4Addr, other: Ipv4Addr, prefix_len: u8) -> bool {
    let host_bits = u32::MAX >> prefix_len;
    let (address, other) = (u32::from(address), u32::from(other));
    address & !host_bits == other & !host_bits
        && address & host_bits != 0
        && address & host_bits != host_bits
}

/// `tcp/7`.
pub(super) fn listen(text: &str) -> Option<(Protocol, u16)> {
    let (protocol, port) = text.split_once('/')?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    Some((protocol, whole(port).filter(|port| *port != 0)?))
}

/// What an interface may be called: `dev_valid_name` in the kernel's `net/core/dev.c`.
pub(super) fn interface(text: &str) -> Option<String> {
    let valid = (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    valid.then(|| text.to_owned())
}

/// A whole file of at most `limit` bytes, from a regular file only: a FIFO would block forever.
pub(super) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    read_to_limit(file, limit)
}

/// The key in a key file, without its trailing newline; `Err` is what was found instead.
pub(super) fn key_file(path: &Path) -> Result<Vec<u8>, KeyFileError> {
    let file = open_regular(path).map_err(KeyFileError::Unreadable)?;
    let mode = file
        .metadata()
        .map_err(KeyFileError::Unreadable)?
        .permissions()
        .mode()
        & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed(mode));
    }
    let mut key = read_to_limit(file, MAX_KEY_BYTES).map_err(KeyFileError::Unreadable)?;
    if key.last() == Some(&b'\n') {
        key.pop();
        if key.last() == Some(&b'\r') {
            key.pop();
        }
    }
    Ok(key)
}

/// Why a key file gives no key.
pub(super) enum KeyFileError {
    Unreadable(io::Error),
    /// Mode with bits for group or others.
    Exposed(u32),
}

fn open_regular(path: &Path) -> io::Result<File> {
    // O_NONBLOCK: opening a FIFO must not wait for a writer before its type is known.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

fn read_to_limit(file: File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("more than {limit} bytes")));
    }
    Ok(bytes)
}
