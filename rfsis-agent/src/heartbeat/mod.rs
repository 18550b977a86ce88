//! Heartbeats: the codec here, the judgement of what is fresh in [`session`].
//!
//! The layout is drawn in [`rfsis_common::heartbeat`]. A frame is an ARP packet (RFC 826), so that it
//! crosses any LAN, with a trailer behind it. [`Codec::parse`] either returns a [`Heartbeat`] of which
//! every byte is checked, or says what was wrong.

pub mod session;
pub mod wish;

use std::net::Ipv4Addr;

use rfsis_common::heartbeat::{ETHERNET_LEN, FRAME_LEN, MAC_LEN, MAGIC, VERSION};
use rfsis_common::maps::State;

use crate::auth::{ClusterKey, cluster_id};
use crate::cli::Role;
use wish::{Objection, Wish};

/// Nanoseconds of CLOCK_MONOTONIC, the clock of `bpf_ktime_get_ns`.
pub type Nanos = u64;

/// Ethernet address (EUI-48).
pub type MacAddr = [u8; 6];

/// Where heartbeats go while the peer is not heard.
pub const BROADCAST: MacAddr = [0xff; 6];

/// The ARP header of every heartbeat up to the operation's last byte (RFC 826): Ethernet, IPv4, 6, 4.
const ARP_HEADER: [u8; 7] = [0, 1, 8, 0, 6, 4, 0];
/// "Who has the peer, tell me": what is sent to the peer alone.
const ARP_REQUEST: u8 = 1;
/// "I am here": what is sent to all. Of a request each Linux host that hears it would ask its routing table
/// whether it is meant, which costs it more than the frame, and the peer's would answer without its agent
/// (`arp_process`, net/ipv4/arp.c).
const ARP_REPLY: u8 = 2;
const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];

/// Bytes from the start of the frame to the MAC that ends it.
const MAC_OFFSET: usize = FRAME_LEN - MAC_LEN;

/// The last heartbeat of the peer that its sender had seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo {
    /// Session of the echoed heartbeat, not 0.
    pub session: u64,
    /// Sequence of the echoed heartbeat.
    pub sequence: u64,
}

/// What a heartbeat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// State of the sender.
    pub state: State,
    /// Role of the sender.
    pub role: Role,
    /// Node id: the sender's own address.
    pub node: Ipv4Addr,
    /// Hardware address of the sender.
    pub mac: MacAddr,
    /// Hardware address of the sender's tap: it sends and takes copies of the VIP's frames.
    pub tap_mac: MacAddr,
    /// Epoch of the sender.
    pub epoch: u64,
    /// Random at each start of the sender's agent, not 0.
    pub session: u64,
    /// 1, 2, 3 … within the session.
    pub sequence: u64,
    /// When it was made, by the sender's clock.
    pub sent_ns: Nanos,
    /// What the sender last saw of its peer.
    pub echo: Option<Echo>,
    /// Whether a standby asks for the VIP.
    pub wish: Wish,
    /// Why an active does not hand it over, in answer to a wish.
    pub objection: Option<Objection>,
    /// Flows that a takeover by the standby would lose, as far as the sender knows.
    pub at_risk: u32,
}

/// Why a frame is not a heartbeat of this cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeartbeatError {
    /// Cut short.
    #[error("heartbeat of {found} bytes, expected {FRAME_LEN} or more: cut short on its way?")]
    Truncated {
        /// Bytes found.
        found: usize,
    },
    /// Not an ARP packet with the magic, or a field holds what no sender writes.
    #[error("heartbeat with an impossible {field}: not sent by an rfsis-agent?")]
    Malformed {
        /// The first field that is wrong.
        field: &'static str,
    },
    /// Another version of the trailer.
    #[error(
        "heartbeat of version {found}, expected {VERSION}: run the same rfsis-agent on both nodes"
    )]
    UnknownVersion {
        /// Version found.
        found: u8,
    },
    /// Another cluster on the same LAN.
    #[error("heartbeat of another cluster, whose id is {found:#018x}: harmless, if there is one")]
    WrongCluster {
        /// Cluster id found.
        found: u64,
    },
    /// Right cluster, wrong key, or forged, or changed on its way.
    #[error("heartbeat with a bad MAC: is the cluster key the same on both nodes?")]
    BadMac,
}

impl HeartbeatError {
    /// Value of the metrics label `result`.
    pub const fn as_str(self) -> &'static str {
        match self {
            HeartbeatError::Truncated { .. } => "truncated",
            HeartbeatError::Malformed { .. } => "malformed",
            HeartbeatError::UnknownVersion { .. } => "unknown_version",
            HeartbeatError::WrongCluster { .. } => "wrong_cluster",
            HeartbeatError::BadMac => "bad_mac",
        }
    }
}

/// Writes and reads heartbeats of one cluster.
#[derive(Clone, Debug)]
pub struct Codec {
    key: ClusterKey,
    cluster_id: [u8; 8],
}

impl Codec {
    /// For the cluster of this name and key (any length; 32 bytes or more are secure).
    pub fn new(key: &[u8], cluster: &str) -> Self {
        Self {
            key: ClusterKey::new(key),
            cluster_id: cluster_id(cluster),
        }
    }

    /// The frame that carries `heartbeat` to the peer at IPv4 address `peer`, by unicast where its
    /// hardware address is given.
    ///
    /// The target's hardware address repeats a unicast destination, and with that puts it under the MAC.
    pub fn emit(
        &self,
        heartbeat: &Heartbeat,
        to: Option<MacAddr>,
        peer: Ipv4Addr,
    ) -> [u8; FRAME_LEN] {
        let mut writer = Writer::new();
        writer.put(&to.unwrap_or(BROADCAST));
        writer.put(&heartbeat.mac);
        writer.put(&ETHERTYPE_ARP);

        writer.put(&ARP_HEADER);
        writer.put(&[if to.is_some() { ARP_REQUEST } else { ARP_REPLY }]);
        writer.put(&heartbeat.mac);
        writer.put(&heartbeat.node.octets());
        writer.put(&to.unwrap_or_default());
        writer.put(&peer.octets());

        let echo = heartbeat.echo.map_or((0, 0), |e| (e.session, e.sequence));
        writer.put(&MAGIC);
        writer.put(&[
            VERSION,
            heartbeat.state as u8,
            role_code(heartbeat.role),
            heartbeat.wish as u8,
        ]);
        writer.put(&self.cluster_id);
        writer.put(&heartbeat.node.octets());
        writer.put(&heartbeat.at_risk.to_be_bytes());
        for number in [
            heartbeat.epoch,
            heartbeat.session,
            heartbeat.sequence,
            heartbeat.sent_ns,
            echo.0,
            echo.1,
        ] {
            writer.put(&number.to_be_bytes());
        }
        writer.put(&heartbeat.tap_mac);
        let objection = heartbeat.objection.map_or(0, |objection| objection as u8);
        writer.put(&[objection, 0]);

        let mac = self.key.tag(&writer.frame[ETHERNET_LEN..MAC_OFFSET]);
        writer.put(&mac);
        writer.frame
    }

    /// The heartbeat in a frame, Ethernet header first. What stands behind it is padding.
    pub fn parse(&self, frame: &[u8]) -> Result<Heartbeat, HeartbeatError> {
        let Some(frame) = frame.first_chunk::<FRAME_LEN>() else {
            return Err(HeartbeatError::Truncated { found: frame.len() });
        };
        let mut reader = Reader(frame);
        let destination: MacAddr = reader.take();
        let source: MacAddr = reader.take();
        reader.expect("EtherType", &ETHERTYPE_ARP)?;

        reader.expect("ARP header", &ARP_HEADER)?;
        let [operation] = reader.take();
        reader.expect("ARP sender hardware address", &source)?;
        let node: [u8; 4] = reader.take();
        let target: MacAddr = reader.take();
        let _peer: [u8; 4] = reader.take();

        reader.expect("magic", &MAGIC)?;
        let [version, state, role, wish] = reader.take();
        if version != VERSION {
            return Err(HeartbeatError::UnknownVersion { found: version });
        }
        let cluster_id: [u8; 8] = reader.take();
        if cluster_id != self.cluster_id {
            return Err(HeartbeatError::WrongCluster {
                found: u64::from_be_bytes(cluster_id),
            });
        }
        self.key
            .authentic(&frame[ETHERNET_LEN..])
            .ok_or(HeartbeatError::BadMac)?;

        // From here on a holder of the key speaks; the checks keep out what no agent writes.
        let malformed = |field| HeartbeatError::Malformed { field };
        let to_target = target == destination && target != MacAddr::default();
        let to_all = target == MacAddr::default() && destination == BROADCAST;
        if !(to_target || to_all) {
            return Err(malformed("Ethernet destination"));
        }
        // Older agents send requests to all.
        if operation != ARP_REQUEST && !(to_all && operation == ARP_REPLY) {
            return Err(malformed("ARP operation"));
        }
        let state = State::from_u8(state).ok_or(malformed("state"))?;
        let role = role_from_code(role).ok_or(malformed("role"))?;
        let wish = Wish::from_u8(wish).ok_or(malformed("wish"))?;
        reader.expect("node id", &node)?;
        let at_risk = u32::from_be_bytes(reader.take());
        let mut heartbeat = Heartbeat {
            state,
            role,
            node: Ipv4Addr::from(node),
            mac: source,
            epoch: reader.number(),
            session: reader.number(),
            sequence: reader.number(),
            sent_ns: reader.number(),
            echo: match (reader.number(), reader.number()) {
                (0, 0) => None,
                (0, _) => return Err(malformed("echo")),
                (session, sequence) => Some(Echo { session, sequence }),
            },
            tap_mac: reader.take(),
            wish,
            objection: None,
            at_risk,
        };
        let [objection] = reader.take();
        heartbeat.objection = Objection::from_u8(objection).ok_or(malformed("objection"))?;
        reader.expect("reserved byte", &[0; 1])?;
        // A group address (IEEE 802) cannot be a sender.
        if heartbeat.tap_mac == MacAddr::default() || heartbeat.tap_mac[0] & 1 != 0 {
            return Err(malformed("tap hardware address"));
        }
        if heartbeat.session == 0 {
            return Err(malformed("session"));
        }
        if heartbeat.sequence == 0 {
            return Err(malformed("sequence"));
        }
        Ok(heartbeat)
    }
}

const fn role_code(role: Role) -> u8 {
    match role {
        Role::Primary => 0,
        Role::Backup => 1,
    }
}

const fn role_from_code(code: u8) -> Option<Role> {
    match code {
        0 => Some(Role::Primary),
        1 => Some(Role::Backup),
        _ => None,
    }
}

/// Fills a frame from the front.
struct Writer {
    frame: [u8; FRAME_LEN],
    position: usize,
}

impl Writer {
    fn new() -> Self {
        Self {
            frame: [0; FRAME_LEN],
            position: 0,
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        let end = self.position + bytes.len();
        self.frame[self.position..end].copy_from_slice(bytes);
        self.position = end;
    }
}

/// Takes a frame from the front. The layout is fixed and its length was checked, so that the reads
/// of [`Codec::parse`], [`FRAME_LEN`] bytes in all, cannot fail.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (head, rest) = self.0.split_at(N);
        bytes.copy_from_slice(head);
        self.0 = rest;
        bytes
    }

    fn number(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }

    fn expect<const N: usize>(
        &mut self,
        field: &'static str,
        expected: &[u8; N],
    ) -> Result<(), HeartbeatError> {
        if self.take() == *expected {
            Ok(())
        } else {
            Err(HeartbeatError::Malformed { field })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rfsis_common::heartbeat::ARP_LEN;

    use super::*;

    const OPERATION: usize = ETHERNET_LEN + 7;
    const TRAILER: usize = ETHERNET_LEN + ARP_LEN;

    const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
    const PEER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

    fn codec() -> Codec {
        Codec::new(KEY, "demo")
    }

    fn heartbeats() -> impl Strategy<Value = Heartbeat> {
        (
            (
                0u8..5,
                any::<bool>(),
                any::<u32>(),
                any::<MacAddr>(),
                hosts(),
            ),
            (any::<u64>(), 1u64.., 1u64.., any::<u64>()),
            proptest::option::of((1u64.., any::<u64>())),
            (0u8..3, 0u8..6, any::<u32>()),
        )
            .prop_map(
                |(
                    (state, primary, node, mac, tap_mac),
                    (epoch, session, sequence, sent_ns),
                    echo,
                    (wish, objection, at_risk),
                )| {
                    Heartbeat {
                        state: State::from_u8(state).unwrap(),
                        role: if primary { Role::Primary } else { Role::Backup },
                        node: Ipv4Addr::from(node),
                        mac,
                        tap_mac,
                        epoch,
                        session,
                        sequence,
                        sent_ns,
                        echo: echo.map(|(session, sequence)| Echo { session, sequence }),
                        wish: Wish::from_u8(wish).unwrap(),
                        objection: Objection::from_u8(objection).unwrap(),
                        at_risk,
                    }
                },
            )
    }

    /// Addresses of single hosts (IEEE 802).
    fn hosts() -> impl Strategy<Value = MacAddr> {
        any::<MacAddr>().prop_filter("a host", |mac| *mac != [0; 6] && mac[0] & 1 == 0)
    }

    fn destinations() -> impl Strategy<Value = Option<MacAddr>> {
        proptest::option::of(any::<MacAddr>().prop_filter("a host", |m| *m != [0; 6]))
    }

    proptest! {
        #[test]
        fn what_is_emitted_is_parsed(heartbeat in heartbeats(), to in destinations(), pad in 0usize..70) {
            let mut frame = codec().emit(&heartbeat, to, PEER).to_vec();
            frame.resize(FRAME_LEN + pad, 0x5a);
            prop_assert_eq!(codec().parse(&frame), Ok(heartbeat));
        }

        #[test]
        fn any_flipped_bit_is_refused(heartbeat in heartbeats(), to in destinations()) {
            let frame = codec().emit(&heartbeat, to, PEER);
            for bit in 0..FRAME_LEN * 8 {
                let mut flipped = frame;
                flipped[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(codec().parse(&flipped).is_err(), "bit {}", bit);
            }
        }

        #[test]
        fn any_truncation_is_refused(heartbeat in heartbeats()) {
            let frame = codec().emit(&heartbeat, None, PEER);
            for len in 0..FRAME_LEN {
                prop_assert_eq!(
                    codec().parse(&frame[..len]),
                    Err(HeartbeatError::Truncated { found: len })
                );
            }
        }

        #[test]
        fn arbitrary_bytes_are_refused_without_panic(frame in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(codec().parse(&frame).is_err());
        }

        /// Whoever holds the key may still write nonsense into the trailer.
        #[test]
        fn authentic_nonsense_does_not_panic(
            heartbeat in heartbeats(),
            nonsense in proptest::collection::vec((TRAILER + 5..MAC_OFFSET, any::<u8>()), 1..6),
        ) {
            let mut frame = codec().emit(&heartbeat, None, PEER);
            for (offset, byte) in nonsense {
                if !(TRAILER + 8..TRAILER + 16).contains(&offset) {
                    frame[offset] = byte;
                }
            }
            sign(&mut frame);
            if let Ok(parsed) = codec().parse(&frame) {
                let mut again = codec().emit(&parsed, None, PEER);
                again[OPERATION] = frame[OPERATION];
                sign(&mut again);
                prop_assert_eq!(again, frame);
            }
        }
    }

    fn sign(frame: &mut [u8; FRAME_LEN]) {
        let mac = codec().key.tag(&frame[ETHERNET_LEN..MAC_OFFSET]);
        frame[MAC_OFFSET..].copy_from_slice(&mac);
    }

    fn sample() -> Heartbeat {
        Heartbeat {
            state: State::Active,
            role: Role::Primary,
            node: Ipv4Addr::new(10, 0, 0, 1),
            mac: [2, 0, 0, 0, 0, 1],
            tap_mac: [2, 0, 0, 0, 1, 1],
            epoch: 7,
            session: 1,
            sequence: 1,
            sent_ns: 5,
            echo: None,
            wish: Wish::None,
            objection: None,
            at_risk: 0,
        }
    }

    #[test]
    fn another_key_cluster_or_version_is_named() {
        let frame = codec().emit(&sample(), None, PEER);
        assert_eq!(
            Codec::new(b"other", "demo").parse(&frame),
            Err(HeartbeatError::BadMac)
        );
        assert_eq!(
            Codec::new(KEY, "other").parse(&frame),
            Err(HeartbeatError::WrongCluster {
                found: u64::from_be_bytes(cluster_id("demo"))
            })
        );
        let mut newer = frame;
        newer[TRAILER + 4] = VERSION + 1;
        assert_eq!(
            codec().parse(&newer),
            Err(HeartbeatError::UnknownVersion { found: VERSION + 1 })
        );
    }

    /// An insider, or a bug, must not make one node speak in another's name on the wire.
    #[test]
    fn a_sender_that_contradicts_itself_is_refused_although_authentic() {
        for (offset, field) in [
            (ETHERNET_LEN + 8, "ARP sender hardware address"),
            (ETHERNET_LEN + 14, "node id"),
            (ETHERNET_LEN + 18, "Ethernet destination"),
            (TRAILER + 5, "state"),
            (TRAILER + 6, "role"),
            (TRAILER + 7, "wish"),
            (TRAILER + 64, "echo"),
            (TRAILER + 78, "objection"),
            (TRAILER + 79, "reserved byte"),
        ] {
            let mut frame = codec().emit(&sample(), None, PEER);
            frame[offset] ^= 0x10;
            sign(&mut frame);
            assert_eq!(
                codec().parse(&frame),
                Err(HeartbeatError::Malformed { field }),
                "offset {offset}"
            );
        }
    }

    #[test]
    fn a_tap_that_is_no_host_is_refused() {
        for tap_mac in [[0; 6], BROADCAST, [3, 0, 0, 0, 0, 1]] {
            let frame = codec().emit(
                &Heartbeat {
                    tap_mac,
                    ..sample()
                },
                None,
                PEER,
            );
            let field = "tap hardware address";
            assert_eq!(
                codec().parse(&frame),
                Err(HeartbeatError::Malformed { field }),
                "{tap_mac:?}"
            );
        }
    }

    const TO: Option<MacAddr> = Some([2, 0, 0, 0, 0, 2]);

    #[test]
    fn the_kernel_side_knows_a_heartbeat_as_one() {
        use rfsis_common::frame::FrameClass;
        for to in [None, TO] {
            let frame = codec().emit(&sample(), to, PEER);
            let class = rfsis_common::frame::classify(&&frame[..], 0xc000_0201);
            assert_eq!(class.class, FrameClass::Heartbeat, "to {to:?}");
        }
    }

    #[test]
    fn the_peer_alone_is_asked_and_all_are_told() {
        for (to, sent, taken) in [(TO, 1, [true, false]), (None, 2, [true, true])] {
            let mut frame = codec().emit(&sample(), to, PEER);
            assert_eq!(frame[OPERATION], sent, "to {to:?}");
            for (operation, taken) in [(0, false), (1, taken[0]), (2, taken[1]), (3, false)] {
                frame[OPERATION] = operation;
                sign(&mut frame);
                let expected = if taken {
                    Ok(sample())
                } else {
                    Err(HeartbeatError::Malformed {
                        field: "ARP operation",
                    })
                };
                assert_eq!(codec().parse(&frame), expected, "to {to:?}: {operation}");
            }
        }
    }
}
