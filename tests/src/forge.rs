//! What an attacker or a broken host puts on the wire.

use std::net::Ipv4Addr;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use hmac::{Hmac, Mac};
use rfsis_common::heartbeat::{ARP_LEN, ETHERNET_LEN, FRAME_LEN, MAC_LEN, MAGIC};
use sha2::{Digest, Sha256};

use crate::faults::SYNC_PORT;
use crate::lab::{Host, VIP};

/// Offsets in a heartbeat frame, as `rfsis_common::heartbeat` draws them.
mod at {
    use super::{ARP_LEN, ETHERNET_LEN};

    pub const TRAILER: usize = ETHERNET_LEN + ARP_LEN;
    pub const STATE: usize = TRAILER + 5;
    pub const CLUSTER: usize = TRAILER + 8;
    pub const NODE: usize = TRAILER + 16;
    pub const EPOCH: usize = TRAILER + 24;
    pub const SEQUENCE: usize = TRAILER + 40;
    pub const MAC: usize = super::FRAME_LEN - super::MAC_LEN;
}

/// Whether a frame looks like a heartbeat of this host.
pub fn is_heartbeat_of(frame: &[u8], host: Host) -> bool {
    frame.len() >= FRAME_LEN
        && frame[12..14] == [0x08, 0x06]
        && frame[at::TRAILER..at::TRAILER + 4] == MAGIC
        && frame[at::NODE..at::NODE + 4] == host.address().octets()
}

/// Changes to a genuine heartbeat, authenticated again or not.
#[derive(Clone, Debug)]
pub struct Forgery(Vec<u8>);

impl Forgery {
    /// Starts from a genuine frame.
    pub fn of(genuine: &[u8]) -> Self {
        Self(genuine[..FRAME_LEN].to_vec())
    }

    /// Claims to be active in this epoch.
    #[must_use]
    pub fn active_in(mut self, epoch: u64) -> Self {
        self.0[at::STATE] = 1;
        self.0[at::EPOCH..at::EPOCH + 8].copy_from_slice(&epoch.to_be_bytes());
        self
    }

    /// Claims to be this much further in the sequence.
    #[must_use]
    pub fn later_by(mut self, heartbeats: u64) -> Self {
        let field = &mut self.0[at::SEQUENCE..at::SEQUENCE + 8];
        let mut bytes = [0; 8];
        bytes.copy_from_slice(field);
        field.copy_from_slice(&(u64::from_be_bytes(bytes) + heartbeats).to_be_bytes());
        self
    }

    /// Claims to belong to another cluster.
    #[must_use]
    pub fn of_cluster(mut self, name: &str) -> Self {
        let id = Sha256::digest(name.as_bytes());
        self.0[at::CLUSTER..at::CLUSTER + 8].copy_from_slice(&id[..8]);
        self
    }

    /// Authenticates the frame as it is now.
    #[must_use]
    pub fn signed(mut self, key: &str) -> Self {
        // An HMAC takes a key of any length (RFC 2104 section 2).
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key.as_bytes()) else {
            return self;
        };
        mac.update(&self.0[ETHERNET_LEN..at::MAC]);
        let tag = mac.finalize().into_bytes();
        self.0[at::MAC..].copy_from_slice(&tag[..MAC_LEN]);
        self
    }

    /// The frame.
    pub fn frame(self) -> Vec<u8> {
        self.0
    }

    /// The frame without its last bytes.
    pub fn cut_by(self, bytes: usize) -> Vec<u8> {
        let mut frame = self.0;
        frame.truncate(frame.len() - bytes);
        frame
    }
}

/// The sync datagram that a host sends in this frame, if it is one.
pub fn sync_datagram_of(frame: &[u8], host: Host) -> Option<&[u8]> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) = (packet.net, packet.transport)
    else {
        return None;
    };
    let is_sync = udp.destination_port() == SYNC_PORT;
    (is_sync && ip.header().source_addr() == host.address()).then_some(udp.payload())
}

/// A frame of the client's that takes a datagram to a host's sync channel as if from this address.
pub fn sync_frame(source: Ipv4Addr, to: Host, datagram: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(Host::Client.mac(), to.mac())
        .ipv4(source.octets(), to.address().octets(), 64)
        .udp(SYNC_PORT, SYNC_PORT);
    let mut frame = Vec::new();
    // Writing to a vector cannot fail.
    builder.write(&mut frame, datagram).ok();
    frame
}

/// A frame by which a host's kernel says to the client's `port` that there is no such connection to `echo`:
/// `seq` is what the client has acknowledged (RFC 9293 section 3.10.7.1).
pub fn denial(from: Host, port: u16, seq: u32) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(from.mac(), Host::Client.mac())
        .ipv4(VIP.octets(), Host::Client.address().octets(), 64)
        .tcp(crate::agent::port::ECHO, port, seq, 0)
        .rst();
    let mut frame = Vec::new();
    // Writing to a vector cannot fail.
    builder.write(&mut frame, &[]).ok();
    frame
}

/// A frame that no sane host sends, with its name.
#[derive(Clone, Debug)]
pub struct Malformed {
    /// What is wrong with it.
    pub name: &'static str,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
}

/// Source port of the malformed segments: no real connection uses it.
const ODD_PORT: u16 = 4_242;

/// Malformed frames of all kinds for the VIP, addressed to a host.
pub fn malformed(to: Host) -> Vec<Malformed> {
    let segment = |payload: &[u8]| tcp_frame(to, 0x18, payload);
    let patched = |payload: &[u8], changes: &[(usize, u8)]| {
        let mut frame = segment(payload);
        for &(at, value) in changes {
            frame[at] = value;
        }
        fix_ip_checksum(&mut frame);
        frame
    };
    const IP: usize = ETHERNET_LEN;
    const TCP: usize = ETHERNET_LEN + 20;
    let cut = |length: usize| segment(b"cut")[..length].to_vec();
    let mut kinds = vec![
        ("IPv4 header cut", cut(IP + 12)),
        ("TCP header cut", cut(TCP + 8)),
        ("nothing behind the Ethernet header", cut(IP)),
        ("IP header length 0", patched(b"x", &[(IP, 0x40)])),
        ("IP header length 60 of 41", patched(b"x", &[(IP, 0x4f)])),
        (
            "IP version 6 in an IPv4 frame",
            patched(b"x", &[(IP, 0x65)]),
        ),
        ("IP length 0", patched(b"x", &[(IP + 2, 0), (IP + 3, 0)])),
        (
            "IP length beyond the frame",
            patched(b"x", &[(IP + 2, 0xff), (IP + 3, 0xff)]),
        ),
        (
            "IP length inside the IP header",
            patched(b"x", &[(IP + 2, 0), (IP + 3, 19)]),
        ),
        ("data offset 0", patched(b"x", &[(TCP + 12, 0)])),
        ("data offset 60 of 21", patched(b"x", &[(TCP + 12, 0xf0)])),
        (
            "bad TCP checksum",
            patched(b"x", &[(TCP + 16, 0xde), (TCP + 17, 0xad)]),
        ),
        ("all flags", tcp_frame(to, 0xff, b"x")),
        ("no flags", tcp_frame(to, 0x00, b"x")),
        ("SYN and FIN", tcp_frame(to, 0x03, b"")),
        ("RST of nothing", tcp_frame(to, 0x04, b"")),
        (
            "first fragment",
            patched(b"fragment", &[(IP + 6, 0x20), (IP + 7, 0)]),
        ),
        (
            "last fragment",
            patched(b"fragment", &[(IP + 6, 0), (IP + 7, 7)]),
        ),
        (
            "fragment beyond 64 KiB",
            patched(b"fragment", &[(IP + 6, 0x3f), (IP + 7, 0xff)]),
        ),
        ("unknown protocol", patched(b"x", &[(IP + 9, 253)])),
        ("UDP with TCP inside", patched(b"x", &[(IP + 9, 17)])),
        (
            "from the VIP to the VIP",
            patched(
                b"x",
                &[(IP + 12, VIP.octets()[0]), (IP + 15, VIP.octets()[3])],
            ),
        ),
        ("heartbeat without its end", heartbeat_stub(to)),
    ];
    let mut bad_ip_checksum = segment(b"x");
    bad_ip_checksum[IP + 10] ^= 0xff;
    kinds.push(("bad IP checksum", bad_ip_checksum));
    for (name, tags) in [
        ("VLAN 5", &[[0x81, 0x00, 0x00, 0x05]][..]),
        (
            "QinQ",
            &[[0x88, 0xa8, 0x00, 0x05], [0x81, 0x00, 0x00, 0x06]],
        ),
    ] {
        let mut tagged = segment(b"x");
        for tag in tags.iter().rev() {
            tagged.splice(12..12, *tag);
        }
        kinds.push((name, tagged));
    }
    let mut tag_cut = segment(b"x")[..ETHERNET_LEN].to_vec();
    tag_cut[12..14].copy_from_slice(&[0x81, 0x00]);
    kinds.push(("VLAN tag cut", tag_cut));
    kinds
        .into_iter()
        .map(|(name, frame)| Malformed { name, frame })
        .collect()
}

/// A well-formed segment from the client to the VIP's echo service.
fn tcp_frame(to: Host, flags: u8, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(Host::Client.mac(), to.mac())
        .ipv4(Host::Client.address().octets(), VIP.octets(), 64)
        .tcp(ODD_PORT, crate::agent::port::ECHO, 1_000, 8_192);
    let mut frame = Vec::new();
    // Writing to a vector cannot fail.
    builder.write(&mut frame, payload).ok();
    const TCP: usize = ETHERNET_LEN + 20;
    let change = u16::from(flags) as u32;
    frame[TCP + 13] = flags;
    // The checksum follows its field (RFC 1624): flags were 0 before.
    let old = u16::from_be_bytes([frame[TCP + 16], frame[TCP + 17]]);
    let mut sum = u32::from(!old) + change;
    sum = (sum & 0xffff) + (sum >> 16);
    let sum = !(sum as u16);
    frame[TCP + 16..TCP + 18].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// The header checksum over the first 20 bytes, whatever they say (RFC 1071).
fn fix_ip_checksum(frame: &mut [u8]) {
    let header = &mut frame[ETHERNET_LEN..ETHERNET_LEN + 20];
    header[10..12].fill(0);
    let mut sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    header[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// An ARP request with the trailer's magic and nothing after it.
fn heartbeat_stub(to: Host) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(to.mac());
    frame.extend(Host::Client.mac());
    frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(Host::Client.mac());
    frame.extend(Host::Client.address().octets());
    frame.extend([0; 6]);
    frame.extend(to.address().octets());
    frame.extend(MAGIC);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::CapturedFrame;

    #[test]
    fn every_malformed_frame_has_a_name_of_its_own_and_differs_from_the_good_one() {
        let kinds = malformed(Host::A);
        let names: std::collections::HashSet<_> = kinds.iter().map(|kind| kind.name).collect();
        assert_eq!(names.len(), kinds.len());
        let good = tcp_frame(Host::A, 0x18, b"x");
        assert!(kinds.iter().all(|kind| kind.frame != good));
    }

    #[test]
    fn a_segment_with_flags_set_afterwards_has_a_right_checksum() {
        let frame = tcp_frame(Host::A, 0x18, b"odd");
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else {
            panic!("no TCP in {frame:?}");
        };
        let sum = tcp.calc_checksum_ipv4(Host::Client.address().octets(), VIP.octets());
        assert_eq!(sum.unwrap(), tcp.checksum());
        let parsed = CapturedFrame {
            at: std::time::UNIX_EPOCH,
            bytes: frame.clone(),
        };
        assert_eq!(parsed.tcp().unwrap().payload, b"odd");
    }
}
