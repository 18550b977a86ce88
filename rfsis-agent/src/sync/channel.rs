//! Datagrams: records between the two nodes, authenticated, and each counted once.
//!
//! ```text
//!  offset  size  field                                            all big-endian
//!     0      4    magic "RFSS"
//!     4      1    version (1)
//!     5      1    flags: 1 the sender wants an answer, the rest 0
//!     6      2    reserved, 0
//!     8      8    cluster id: first 8 bytes of SHA-256(cluster name)
//!    16      4    node id: IPv4 address of the sender
//!    20      4    reserved, 0
//!    24      8    epoch
//!    32      8    session of the sender
//!    40      8    session of the receiver
//!    48      8    sequence: 1, 2, 3 … within the sender's session
//!    56      n    records
//!  56+n     16    HMAC-SHA256 over all before it, truncated
//! ```
//!
//! A MAC says who wrote a datagram, not when. Both sessions are random, and the heartbeats have proven
//! that the two nodes are in them *now*; within them a sequence counts once. So nothing that was recorded
//! before either node started counts, and nothing that came already does.

use std::net::Ipv4Addr;

use rfsis_common::heartbeat::MAC_LEN;

use super::record::{MAX_RECORD_LEN, Record, RecordError, Records};
use super::replay::ReplayWindow;
use super::{Cut, Reader};
use crate::auth::{ClusterKey, cluster_id};
use crate::fault::faulty;

/// First bytes of a datagram.
pub const MAGIC: [u8; 4] = *b"RFSS";
/// Version of the datagram that this build speaks.
pub const VERSION: u8 = 1;
/// Bytes in front of the records.
pub const HEADER_LEN: usize = 56;
/// Most bytes of a datagram: with IPv4 and UDP headers it fits an MTU of 1500, and of most tunnels.
pub const MAX_DATAGRAM: usize = 1400;

/// Where the fields begin that are read only when the MAC has proven them.
const NODE_OFFSET: usize = 16;
/// Bytes of a datagram without records.
const MIN_DATAGRAM: usize = HEADER_LEN + MAC_LEN;
/// The sender wants an answer.
const WANTS_ANSWER: u8 = 1;
/// What the key of the channel is derived for.
const PURPOSE: &str = "rfsis sync 1";

// Else `seal` would never end.
const _: () = assert!(MIN_DATAGRAM + MAX_RECORD_LEN <= MAX_DATAGRAM);

/// Why a datagram has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyncError {
    /// Cut short.
    #[error(
        "sync datagram of {found} bytes, expected {MIN_DATAGRAM} or more: cut short on its way?"
    )]
    Truncated {
        /// Bytes found.
        found: usize,
    },
    /// Without the magic, or a field holds what no sender writes.
    #[error("sync datagram with an impossible {field}: not sent by an rfsis-agent?")]
    Malformed {
        /// The first field that is wrong.
        field: &'static str,
    },
    /// Another version of the format.
    #[error(
        "sync datagram of version {found}, expected {VERSION}: run the same rfsis-agent on both nodes"
    )]
    UnknownVersion {
        /// Version found.
        found: u8,
    },
    /// Another cluster that uses the same address and port.
    #[error(
        "sync datagram of another cluster, whose id is {found:#018x}: give each cluster its own `sync_port`"
    )]
    WrongCluster {
        /// Cluster id found.
        found: u64,
    },
    /// Right cluster, wrong key, or forged, or changed on its way.
    #[error("sync datagram with a bad MAC: is the cluster key the same on both nodes?")]
    BadMac,
    /// What this node sent itself.
    #[error("sync datagram of this node itself: somebody sends it back")]
    OwnId,
    /// Its sender, by its node id or its address, is not the peer.
    #[error(
        "sync datagram of the unknown node {found}: is a third host configured with this cluster's name and key?"
    )]
    UnknownNode {
        /// Node id or address found.
        found: Ipv4Addr,
    },
    /// Between other sessions than those that the heartbeats have proven.
    #[error("sync datagram of another session: a node has just restarted, or it is a replay")]
    WrongSession,
    /// The nodes do not agree on who is active.
    #[error("sync datagram of epoch {found}, expected {expected}: a takeover is under way")]
    WrongEpoch {
        /// Epoch found.
        found: u64,
        /// Epoch of this node.
        expected: u64,
    },
    /// Its sequence was seen before, or is too old to tell: a duplicate or a replay.
    #[error("sync datagram seen before, or much older than the latest")]
    Stale,
}

impl From<Cut> for SyncError {
    fn from(_: Cut) -> Self {
        SyncError::Malformed { field: "length" }
    }
}

impl From<RecordError> for SyncError {
    fn from(error: RecordError) -> Self {
        SyncError::Malformed { field: error.field }
    }
}

/// A datagram of the peer that counts.
#[derive(Clone, Debug)]
pub struct Opened<'a> {
    /// What it says.
    pub records: Records<'a>,
    /// The peer wants a datagram in return, be it without records.
    pub wants_answer: bool,
}

/// This node's end of the channel to its peer. Sends and receives nothing by itself.
#[derive(Debug)]
pub struct Channel {
    key: ClusterKey,
    cluster_id: [u8; 8],
    node: Ipv4Addr,
    peer: Ipv4Addr,
    own_session: u64,
    /// Of the last datagram sealed.
    sequence: u64,
    peer_session: Option<u64>,
    /// What came of session `seen_of`.
    seen: ReplayWindow,
    seen_of: Option<u64>,
    /// The datagram being made.
    buffer: Vec<u8>,
}

impl Channel {
    /// From the node at `node` to the one at `peer`. `own_session` is that of this node's heartbeats;
    /// a session must have one channel only, because its sequence starts anew.
    pub fn new(
        key: &[u8],
        cluster: &str,
        node: Ipv4Addr,
        peer: Ipv4Addr,
        own_session: u64,
    ) -> Self {
        Self {
            key: ClusterKey::new(key).derive(PURPOSE),
            cluster_id: cluster_id(cluster),
            node,
            peer,
            own_session,
            sequence: 0,
            peer_session: None,
            seen: ReplayWindow::default(),
            seen_of: None,
            buffer: Vec::with_capacity(MAX_DATAGRAM),
        }
    }

    /// The peer's session as the heartbeats have established it, or none yet.
    ///
    /// Only another session starts the window against replay anew.
    pub fn set_peer(&mut self, session: Option<u64>) {
        self.peer_session = session;
        if session.is_some() && session != self.seen_of {
            self.seen = ReplayWindow::default();
            self.seen_of = session;
        }
    }

    /// Hands the records to `send` as datagrams of at most [`MAX_DATAGRAM`] bytes, one at the least: it
    /// then is a sign of life. The first says whether an answer is wanted.
    ///
    /// While the peer has no session nothing can be said to it: nothing is sent, and what matters is
    /// said again later.
    pub fn seal(
        &mut self,
        epoch: u64,
        wants_answer: bool,
        records: impl IntoIterator<Item = Record>,
        mut send: impl FnMut(&[u8]),
    ) {
        let Some(peer_session) = self.peer_session else {
            return;
        };
        let mut records = records.into_iter().peekable();
        let mut flags = if wants_answer { WANTS_ANSWER } else { 0 };
        loop {
            self.put_header(epoch, flags, peer_session);
            let datagram = &mut self.buffer;
            while let Some(record) = records
                .next_if(|record| datagram.len() + record.wire_len() + MAC_LEN <= MAX_DATAGRAM)
            {
                record.emit(datagram);
            }
            let tag = self.key.tag(datagram);
            datagram.extend(tag);
            send(datagram);
            flags = 0;
            if records.peek().is_none() {
                return;
            }
        }
    }

    fn put_header(&mut self, epoch: u64, flags: u8, peer_session: u64) {
        self.sequence += 1;
        let datagram = &mut self.buffer;
        datagram.clear();
        datagram.extend(MAGIC);
        datagram.extend([VERSION, flags, 0, 0]);
        datagram.extend(self.cluster_id);
        datagram.extend(self.node.octets());
        datagram.extend([0; 4]);
        for number in [epoch, self.own_session, peer_session, self.sequence] {
            datagram.extend(number.to_be_bytes());
        }
    }

    /// Judges what came by UDP from the address `from`, while this node's epoch is `epoch`.
    ///
    /// # Errors
    /// The first of the checks that fails. Such a datagram is to be counted and has no other effect.
    pub fn open<'a>(
        &mut self,
        datagram: &'a [u8],
        from: Ipv4Addr,
        epoch: u64,
    ) -> Result<Opened<'a>, SyncError> {
        if datagram.len() < MIN_DATAGRAM {
            return Err(SyncError::Truncated {
                found: datagram.len(),
            });
        }
        let malformed = |field| SyncError::Malformed { field };
        if datagram.len() > MAX_DATAGRAM {
            return Err(malformed("length"));
        }
        let mut reader = Reader(datagram);
        if reader.array()? != MAGIC {
            return Err(malformed("magic"));
        }
        let [version, flags, reserved @ ..]: [u8; 4] = reader.array()?;
        if version != VERSION {
            return Err(SyncError::UnknownVersion { found: version });
        }
        let cluster_id = reader.array()?;
        if cluster_id != self.cluster_id {
            return Err(SyncError::WrongCluster {
                found: u64::from_be_bytes(cluster_id),
            });
        }
        let message = self.key.authentic(datagram).ok_or(SyncError::BadMac)?;

        // From here on a holder of the key speaks.
        let mut reader = Reader(&message[NODE_OFFSET..]);
        let node = Ipv4Addr::from(reader.array::<4>()?);
        if node == self.node {
            return Err(SyncError::OwnId);
        }
        if let Some(found) = [node, from].into_iter().find(|found| *found != self.peer) {
            return Err(SyncError::UnknownNode { found });
        }
        if flags & !WANTS_ANSWER != 0 || reserved != [0; 2] || reader.array()? != [0; 4] {
            return Err(malformed("flags or reserved bytes"));
        }
        let found = reader.u64()?;
        let sessions = (Some(reader.u64()?), reader.u64()?);
        if sessions != (self.peer_session, self.own_session) {
            return Err(SyncError::WrongSession);
        }
        if found != epoch {
            return Err(SyncError::WrongEpoch {
                found,
                expected: epoch,
            });
        }
        let sequence = reader.u64()?;
        let records = Records::parse(reader.0)?;
        if !self.seen.accept(sequence) && !faulty!(AcceptReplays) {
            return Err(SyncError::Stale);
        }
        Ok(Opened {
            records,
            wants_answer: flags & WANTS_ANSWER != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::sync::record::tests::records;

    const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const EPOCH: u64 = 7;
    const A_SESSION: u64 = 0xa1;
    const B_SESSION: u64 = 0xb2;

    /// Node A, which seals for B.
    fn a() -> Channel {
        let mut channel = Channel::new(KEY, "demo", A, B, A_SESSION);
        channel.set_peer(Some(B_SESSION));
        channel
    }

    /// Node B, which opens what A sealed.
    fn b() -> Channel {
        let mut channel = Channel::new(KEY, "demo", B, A, B_SESSION);
        channel.set_peer(Some(A_SESSION));
        channel
    }

    fn seal(channel: &mut Channel, epoch: u64, ping: bool, records: &[Record]) -> Vec<Vec<u8>> {
        let mut datagrams = Vec::new();
        channel.seal(epoch, ping, records.iter().cloned(), |datagram| {
            datagrams.push(datagram.to_vec());
        });
        datagrams
    }

    /// One datagram without records.
    fn ping(channel: &mut Channel) -> Vec<u8> {
        let mut datagrams = seal(channel, EPOCH, true, &[]);
        assert_eq!(datagrams.len(), 1);
        datagrams.remove(0)
    }

    fn result(channel: &mut Channel, datagram: &[u8]) -> Result<Vec<Record>, SyncError> {
        channel
            .open(datagram, A, EPOCH)
            .map(|opened| opened.records.collect())
    }

    /// What node A would send had it these bytes in place of its own.
    fn forge(datagram: &[u8], offset: usize, bytes: &[u8]) -> Vec<u8> {
        let mut message = datagram[..datagram.len() - MAC_LEN].to_vec();
        message[offset..offset + bytes.len()].copy_from_slice(bytes);
        sign(message)
    }

    fn sign(mut message: Vec<u8>) -> Vec<u8> {
        let tag = a().key.tag(&message);
        message.extend(tag);
        message
    }

    proptest! {
        #[test]
        fn what_is_sealed_is_opened(records in vec(records(), 0..200), wants in any::<bool>()) {
            let datagrams = seal(&mut a(), EPOCH, wants, &records);
            let mut receiver = b();
            let mut opened = Vec::new();
            for (index, datagram) in datagrams.iter().enumerate() {
                prop_assert!(datagram.len() <= MAX_DATAGRAM);
                let datagram = receiver.open(datagram, A, EPOCH).unwrap();
                prop_assert_eq!(datagram.wants_answer, wants && index == 0);
                opened.extend(datagram.records);
            }
            prop_assert_eq!(opened, records);
            // No datagram is sent for what would have fitted the one before.
            for pair in datagrams.windows(2) {
                let first = pair[1][HEADER_LEN + 1];
                prop_assert!(pair[0].len() + 2 + usize::from(first) > MAX_DATAGRAM);
            }
        }

        #[test]
        fn any_flipped_bit_is_refused(records in vec(records(), 0..6)) {
            let datagram = &seal(&mut a(), EPOCH, true, &records)[0];
            let mut receiver = b();
            for bit in 0..datagram.len() * 8 {
                let mut flipped = datagram.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(receiver.open(&flipped, A, EPOCH).is_err(), "bit {}", bit);
            }
            prop_assert!(receiver.open(datagram, A, EPOCH).is_ok());
        }

        #[test]
        fn any_truncation_is_refused(records in vec(records(), 0..6)) {
            let datagram = &seal(&mut a(), EPOCH, true, &records)[0];
            for len in 0..datagram.len() {
                let expected = if len < MIN_DATAGRAM {
                    SyncError::Truncated { found: len }
                } else {
                    SyncError::BadMac
                };
                prop_assert_eq!(result(&mut b(), &datagram[..len]), Err(expected));
            }
        }

        #[test]
        fn arbitrary_bytes_are_refused_without_panic(bytes in vec(any::<u8>(), 0..2000)) {
            prop_assert!(b().open(&bytes, A, EPOCH).is_err());
        }

        /// Whoever holds the key may still write nonsense.
        #[test]
        fn authentic_nonsense_does_not_panic(
            nonsense in vec((5usize..HEADER_LEN, any::<u8>()), 0..4),
            body in vec(any::<u8>(), 0..200),
        ) {
            let mut message = ping(&mut a());
            message.truncate(HEADER_LEN);
            message.extend(body);
            for (offset, byte) in nonsense {
                message[offset] = byte;
            }
            let _ = b().open(&sign(message), A, EPOCH);
        }

        /// However they are reordered, lost and repeated on the way.
        #[test]
        fn each_datagram_counts_at_most_once(arrivals in vec(0usize..64, 0..300)) {
            let mut sender = a();
            let datagrams: Vec<_> = (0..64).map(|_| ping(&mut sender)).collect();
            let mut receiver = b();
            let mut seen = [false; 64];
            for index in arrivals {
                let expected = if std::mem::replace(&mut seen[index], true) {
                    Err(SyncError::Stale)
                } else {
                    Ok(Vec::new())
                };
                prop_assert_eq!(result(&mut receiver, &datagrams[index]), expected);
            }
        }
    }

    #[test]
    fn what_falls_behind_the_window_is_stale() {
        use crate::sync::replay::WINDOW;
        let mut sender = a();
        let datagrams: Vec<_> = (0..=WINDOW).map(|_| ping(&mut sender)).collect();
        let mut receiver = b();
        let (first, rest) = datagrams.split_first().unwrap();
        for datagram in rest.iter().rev() {
            assert_eq!(result(&mut receiver, datagram), Ok(Vec::new()));
        }
        assert_eq!(result(&mut receiver, first), Err(SyncError::Stale));
    }

    #[test]
    fn another_key_cluster_version_or_epoch_is_named() {
        let datagram = ping(&mut a());
        let refusal = |key: &[u8], cluster| {
            let mut receiver = Channel::new(key, cluster, B, A, B_SESSION);
            receiver.set_peer(Some(A_SESSION));
            result(&mut receiver, &datagram)
        };
        assert_eq!(refusal(b"other", "demo"), Err(SyncError::BadMac));
        let found = u64::from_be_bytes(cluster_id("demo"));
        assert_eq!(
            refusal(KEY, "other"),
            Err(SyncError::WrongCluster { found })
        );
        let found = VERSION + 1;
        assert_eq!(
            result(&mut b(), &forge(&datagram, 4, &[found])),
            Err(SyncError::UnknownVersion { found })
        );
        for found in [EPOCH - 1, EPOCH + 1] {
            let datagram = &seal(&mut a(), found, false, &[])[0];
            let expected = EPOCH;
            assert_eq!(
                result(&mut b(), datagram),
                Err(SyncError::WrongEpoch { found, expected })
            );
        }
    }

    #[test]
    fn only_the_peer_from_its_own_address_is_heard() {
        let third = Ipv4Addr::new(10, 0, 0, 3);
        let datagram = ping(&mut a());
        let unknown = Err(SyncError::UnknownNode { found: third });
        assert_eq!(b().open(&datagram, third, EPOCH).map(drop), unknown);
        let mut stranger = Channel::new(KEY, "demo", third, B, A_SESSION);
        stranger.set_peer(Some(B_SESSION));
        assert_eq!(b().open(&ping(&mut stranger), A, EPOCH).map(drop), unknown);
        // Sent back to where it came from.
        let reflected = a().open(&datagram, B, EPOCH).map(drop);
        assert_eq!(reflected, Err(SyncError::OwnId));
    }

    #[test]
    fn nothing_counts_between_other_sessions_than_the_present() {
        let datagram = ping(&mut a());
        let mut restarted = Channel::new(KEY, "demo", B, A, B_SESSION + 1);
        restarted.set_peer(Some(A_SESSION));
        let mut unproven = Channel::new(KEY, "demo", B, A, B_SESSION);
        let mut peer_restarted = b();
        peer_restarted.set_peer(Some(A_SESSION + 1));
        for receiver in [&mut restarted, &mut unproven, &mut peer_restarted] {
            assert_eq!(result(receiver, &datagram), Err(SyncError::WrongSession));
        }
        unproven.set_peer(Some(A_SESSION));
        assert_eq!(result(&mut unproven, &datagram), Ok(Vec::new()));
    }

    #[test]
    fn a_new_session_starts_the_window_anew_and_a_known_one_does_not() {
        let datagram = ping(&mut a());
        let mut receiver = b();
        assert_eq!(result(&mut receiver, &datagram), Ok(Vec::new()));
        receiver.set_peer(None);
        receiver.set_peer(Some(A_SESSION));
        assert_eq!(result(&mut receiver, &datagram), Err(SyncError::Stale));
        let mut sender = Channel::new(KEY, "demo", A, B, A_SESSION + 1);
        sender.set_peer(Some(B_SESSION));
        receiver.set_peer(Some(A_SESSION + 1));
        assert_eq!(result(&mut receiver, &ping(&mut sender)), Ok(Vec::new()));
    }

    #[test]
    fn without_a_session_of_the_peer_nothing_is_sent() {
        let mut channel = Channel::new(KEY, "demo", A, B, A_SESSION);
        channel.seal(EPOCH, true, [], |_| panic!("sent to nobody"));
    }

    /// A refused datagram leaves no trace: the genuine one of the same sequence still counts.
    #[test]
    fn authentic_datagrams_that_no_agent_writes_are_refused_without_effect() {
        let close = Record::Close {
            flow: crate::segment::flow_key(A, 1, 2),
            client_isn: 3,
        };
        let datagram = &seal(&mut a(), EPOCH, false, std::slice::from_ref(&close))[0];
        let mut receiver = b();
        for (offset, field) in [
            (5, "flags or reserved bytes"),
            (6, "flags or reserved bytes"),
            (7, "flags or reserved bytes"),
            (20, "flags or reserved bytes"),
            (23, "flags or reserved bytes"),
            (HEADER_LEN + 1, "record length"),
        ] {
            assert_eq!(
                result(&mut receiver, &forge(datagram, offset, &[0x80])),
                Err(SyncError::Malformed { field }),
                "offset {offset}"
            );
        }
        let long = [&datagram[..], &[0; MAX_DATAGRAM]].concat();
        let field = "length";
        assert_eq!(
            result(&mut receiver, &long),
            Err(SyncError::Malformed { field })
        );
        assert_eq!(
            result(&mut receiver, &forge(datagram, 48, &[0; 8])),
            Err(SyncError::Stale)
        );
        assert_eq!(result(&mut receiver, datagram), Ok(vec![close]));
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let mut sender = a();
        ping(&mut sender);
        let datagram = ping(&mut sender);
        let expected = [
            &b"RFSS\x01\x01\0\0"[..],
            &cluster_id("demo"),
            &[10, 0, 0, 1, 0, 0, 0, 0],
            &EPOCH.to_be_bytes(),
            &A_SESSION.to_be_bytes(),
            &B_SESSION.to_be_bytes(),
            &2u64.to_be_bytes(),
        ]
        .concat();
        assert_eq!(datagram[..datagram.len() - MAC_LEN], expected);
        assert_eq!((expected.len(), datagram.len()), (HEADER_LEN, MIN_DATAGRAM));
    }

    /// A heartbeat's MAC is made with the cluster key itself.
    #[test]
    fn a_mac_by_the_key_of_heartbeats_is_none_of_a_datagram() {
        let mut datagram = ping(&mut a());
        let end = datagram.len() - MAC_LEN;
        let tag = ClusterKey::new(KEY).tag(&datagram[..end]);
        datagram[end..].copy_from_slice(&tag);
        assert_eq!(result(&mut b(), &datagram), Err(SyncError::BadMac));
    }
}
