//! Prompt datagrams, as user space makes and reads them: `rfsis_common::prompt` says what they are for.

use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;

use rfsis_common::ack_gate::Confirmation;
use rfsis_common::agree::{ANSWER_LEN, AgreePeer, Answer, AnswerWords};
use rfsis_common::prompt::{
    HEADER_LEN, MAGIC, MAX_LEN, MAX_RECORDS, PromptPeer, PromptRecord, PromptSeen, RECORD_LEN,
    SEQUENCE, SipHash, TAG_LEN, VERSION, WRITTEN, head, len_of,
};

use super::{Confirm, Sack, SyncError};
use crate::auth::{ClusterKey, cluster_id};
use crate::pledge::Words;

/// What the keys are derived for: confirmations, and openings on which the kernels agree.
const PROMPT: &str = "rfsis prompt 1";
const AGREE: &str = "rfsis agree 1";

/// Two nodes in their present sessions and epoch: what a key is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// Session of this node.
    pub own_session: u64,
    /// Session of the peer.
    pub peer_session: u64,
    /// Epoch of both.
    pub epoch: u64,
}

/// This node's end: makes what the standby sends, and says what the active's kernel takes.
#[derive(Debug)]
pub struct Prompts {
    key: ClusterKey,
    cluster_id: [u8; 8],
    node: Ipv4Addr,
    peer: Ipv4Addr,
    port: u16,
    term: Option<Term>,
    sending: [u64; 2],
    receiving: PromptPeer,
    agreeing: AgreePeer,
    /// One word: the sequence of the last datagram sealed, here or by the programs.
    sequence: Words,
    /// How many were sealed here.
    sealed: u64,
    /// Number of the element in which the programs note what came to them.
    seen_by_programs: u32,
}

impl Prompts {
    /// From the node at `node` to the one at `peer`, both at UDP port `port`.
    pub fn new(key: &[u8], cluster: &str, node: Ipv4Addr, peer: Ipv4Addr, port: u16) -> Self {
        Self {
            key: ClusterKey::new(key),
            cluster_id: cluster_id(cluster),
            node,
            peer,
            port,
            term: None,
            sending: [0; 2],
            receiving: PromptPeer::default(),
            agreeing: AgreePeer::default(),
            sequence: Words::own(1),
            sealed: 0,
            seen_by_programs: 0,
        }
    }

    /// Shares the sequence with the programs: one word.
    pub fn share(&mut self, sequence: Words) {
        self.sequence = sequence;
    }

    /// How many datagrams the programs have made.
    pub fn sealed_by_programs(&self) -> u64 {
        let last = self.sequence.get(0);
        let last = last.map_or(0, |last| last.load(Ordering::SeqCst));
        last.saturating_sub(self.sealed)
    }

    /// The nodes are in another term than before, or in none. Gives from whom the kernel is to take datagrams, and
    /// with whom it may agree on openings, if that has changed.
    pub fn set_term(&mut self, term: Option<Term>) -> Option<(PromptPeer, AgreePeer)> {
        if term == self.term {
            return None;
        }
        self.term = term;
        self.seen_by_programs ^= 1;
        self.receiving = PromptPeer::nobody(self.seen_by_programs);
        self.agreeing = AgreePeer::default();
        if let Some(term) = term {
            let (own, peer) = (term.own_session, term.peer_session);
            let own_key = |purpose| self.derive(purpose, self.node, own, peer, term.epoch);
            let peers_key = |purpose| self.derive(purpose, self.peer, peer, own, term.epoch);
            let [peer, node] = [self.peer, self.node].map(u32::from);
            let port = self.port.into();
            let receiving = PromptPeer {
                key: peers_key(PROMPT),
                peer,
                node,
                port,
                ..self.receiving
            };
            let agreeing = AgreePeer {
                taking: peers_key(AGREE),
                giving: own_key(AGREE),
                peer,
                node,
                port,
                reserved: 0,
                prompting: own_key(PROMPT),
            };
            self.sending = agreeing.prompting;
            (self.receiving, self.agreeing) = (receiving, agreeing);
        }
        Some((self.receiving, self.agreeing))
    }

    /// With whom the kernel may agree on openings.
    pub fn agreeing(&self) -> AgreePeer {
        self.agreeing
    }

    /// The epoch of the term.
    pub fn epoch(&self) -> Option<u64> {
        self.term.map(|term| term.epoch)
    }

    /// The key under which `sender` speaks.
    fn derive(
        &self,
        purpose: &str,
        sender: Ipv4Addr,
        session: u64,
        other: u64,
        epoch: u64,
    ) -> [u64; 2] {
        let mut term = Vec::with_capacity(36);
        term.extend(self.cluster_id);
        term.extend(sender.octets());
        for number in [session, other, epoch] {
            term.extend(number.to_be_bytes());
        }
        let [a, b, c, d, e, f, g, h, rest @ ..] = self.key.derive(purpose).tag(&term);
        [
            u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            u64::from_le_bytes(rest),
        ]
    }

    /// Which element of the programs' map holds what came from the present peer.
    pub fn seen_by_programs(&self) -> u32 {
        self.seen_by_programs
    }

    /// Hands the confirmations, which name no SACK blocks, to `send` as datagrams. While the peer has no
    /// session nothing can be said to it.
    pub fn seal(&mut self, confirms: &[Confirm], mut send: impl FnMut(&[u8])) {
        if self.term.is_none() {
            return;
        }
        for chunk in confirms.chunks(MAX_RECORDS) {
            let Some(last) = self.sequence.get(0) else {
                return;
            };
            let sequence = last.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
            self.sealed += 1;
            let mut datagram = [0; MAX_LEN];
            datagram[..8].copy_from_slice(&head(false).to_ne_bytes());
            datagram[SEQUENCE * 8..HEADER_LEN].copy_from_slice(&sequence.to_be_bytes());
            let mut end = HEADER_LEN;
            for confirm in chunk {
                let record = PromptRecord {
                    flow: confirm.flow,
                    client_isn: confirm.client_isn,
                    confirmation: Confirmation::new(confirm.ack, confirm.edge),
                };
                for word in record.to_words() {
                    datagram[end..end + 8].copy_from_slice(&word.to_ne_bytes());
                    end += 8;
                }
            }
            let tag = tag(self.sending, &datagram[..end]);
            datagram[end..end + TAG_LEN].copy_from_slice(&tag);
            send(&datagram[..end + TAG_LEN]);
        }
    }
}

impl Prompts {
    /// Judges an answer to an opening that the programs have left to the agent. It came from the address `from`.
    ///
    /// # Errors
    /// The first of the checks that fails. Such a datagram is to be counted and has no other effect.
    pub fn open_answer(&self, datagram: &[u8], from: Ipv4Addr) -> Result<Answer, SyncError> {
        let Ok(bytes) = <&[u8; ANSWER_LEN]>::try_from(datagram) else {
            return Err(SyncError::Malformed { field: "length" });
        };
        let mut words = AnswerWords::default();
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let answer = Answer::open(&words, self.agreeing.taking);
        // All zeros is nobody, whose key anybody knows.
        let answer = answer.filter(|_| self.agreeing != AgreePeer::default());
        let answer = answer.ok_or(SyncError::BadMac)?;
        if from != self.peer {
            return Err(SyncError::UnknownNode { found: from });
        }
        Ok(answer)
    }

    /// Judges what the programs have left to the agent, or have not got: see [`open`].
    ///
    /// # Errors
    /// Likewise.
    pub fn open(
        &self,
        datagram: &[u8],
        from: Ipv4Addr,
        seen: PromptSeen,
    ) -> Result<(Vec<Confirm>, PromptSeen), SyncError> {
        open(&self.receiving, datagram, from, seen)
    }
}

/// Judges a datagram: is it `peer`'s, and not one of those `seen` before? It came from the address `from`. Gives
/// what it says, and what is seen then.
///
/// # Errors
/// The first of the checks that fails. Such a datagram is to be counted and has no other effect.
pub fn open(
    peer: &PromptPeer,
    datagram: &[u8],
    from: Ipv4Addr,
    seen: PromptSeen,
) -> Result<(Vec<Confirm>, PromptSeen), SyncError> {
    let found = datagram.len();
    if found < len_of(1) {
        return Err(SyncError::Truncated { found });
    }
    let malformed = |field| SyncError::Malformed { field };
    if found > MAX_LEN || !(found - len_of(0)).is_multiple_of(RECORD_LEN) {
        return Err(malformed("length"));
    }
    if datagram[..4] != MAGIC {
        return Err(malformed("magic"));
    }
    if datagram[4] != VERSION {
        return Err(SyncError::UnknownVersion { found: datagram[4] });
    }
    let (message, tagged) = datagram.split_at(found - TAG_LEN);
    let differs = tag(peer.key, message)
        .iter()
        .zip(tagged)
        .fold(0, |differs, (a, b)| differs | (a ^ b));
    // All zeros is nobody, whose key anybody knows.
    if *peer == PromptPeer::nobody(peer.seen) || differs != 0 {
        return Err(SyncError::BadMac);
    }
    if u32::from(from) != peer.peer {
        return Err(SyncError::UnknownNode { found: from });
    }
    let words = message.as_chunks().0;
    let word = |at: usize| words.get(at).copied().map_or(0, u64::from_be_bytes);
    let seen = seen.accept(word(SEQUENCE)).ok_or(SyncError::Stale)?;
    let confirms = (HEADER_LEN..message.len()).step_by(RECORD_LEN).map(|at| {
        let at = at / 8;
        let words = [at, at + 1, at + 2].map(|at| word(at).to_be());
        let record = PromptRecord::from_words(words);
        Confirm {
            flow: record.flow,
            client_isn: record.client_isn,
            ack: record.confirmation.ack(),
            edge: record.confirmation.edge(),
            sack: Sack::default(),
        }
    });
    Ok((confirms.collect(), seen))
}

/// The tag of a message of whole words.
fn tag(key: [u64; 2], message: &[u8]) -> [u8; TAG_LEN] {
    let mut hash = SipHash::new(key);
    for (index, word) in message.as_chunks().0.iter().enumerate() {
        // A device may have written here.
        let word = if index == WRITTEN { &[0; 8] } else { word };
        hash.absorb(u64::from_ne_bytes(*word));
    }
    let [a, b] = hash.finish(message.len());
    let mut tag = [0; TAG_LEN];
    tag[..8].copy_from_slice(&a.to_ne_bytes());
    tag[8..].copy_from_slice(&b.to_ne_bytes());
    tag
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rfsis_common::maps::FlowKey;
    use rfsis_common::prompt;

    use super::*;

    const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const TERM: Term = Term {
        own_session: 0xa1,
        peer_session: 0xb2,
        epoch: 7,
    };

    fn end(node: Ipv4Addr, peer: Ipv4Addr, term: Option<Term>) -> Prompts {
        let mut prompts = Prompts::new(KEY, "demo", node, peer, 9501);
        prompts.set_term(term);
        prompts
    }

    fn a() -> Prompts {
        end(A, B, Some(TERM))
    }

    fn of_b(term: Term) -> Term {
        Term {
            own_session: term.peer_session,
            peer_session: term.own_session,
            ..term
        }
    }

    fn b() -> Prompts {
        end(B, A, Some(of_b(TERM)))
    }

    fn seal(prompts: &mut Prompts, confirms: &[Confirm]) -> Vec<Vec<u8>> {
        let mut datagrams = Vec::new();
        prompts.seal(confirms, |datagram| datagrams.push(datagram.to_vec()));
        datagrams
    }

    fn confirms() -> impl Strategy<Value = Confirm> {
        any::<(u32, u16, u16, u32, u32, u32)>().prop_map(
            |(client_addr, client_port, service_port, client_isn, ack, edge)| Confirm {
                flow: FlowKey {
                    client_addr,
                    client_port,
                    service_port,
                },
                client_isn,
                ack,
                edge,
                sack: Sack::default(),
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_sealed_is_opened_once(confirms in vec(confirms(), 1..30)) {
            let (datagrams, receiver) = (seal(&mut a(), &confirms), b());
            let (mut seen, mut opened) = (PromptSeen::default(), Vec::new());
            for datagram in &datagrams {
                let (said, now) = receiver.open(datagram, A, seen).unwrap();
                opened.extend(said);
                seen = now;
                prop_assert_eq!(receiver.open(datagram, A, seen).unwrap_err(), SyncError::Stale);
            }
            prop_assert_eq!(opened, confirms);
            prop_assert_eq!(datagrams.len(), seen.highest as usize);
        }

        #[test]
        fn any_flipped_bit_and_any_other_length_is_refused(confirms in vec(confirms(), 1..9)) {
            let datagram = &seal(&mut a(), &confirms)[0];
            let (receiver, seen) = (b(), PromptSeen::default());
            let written = WRITTEN * 64..(WRITTEN + 1) * 64;
            for bit in (0..datagram.len() * 8).filter(|bit| !written.contains(bit)) {
                let mut flipped = datagram.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(receiver.open(&flipped, A, seen).is_err(), "bit {}", bit);
            }
            for len in 0..datagram.len() {
                prop_assert!(receiver.open(&datagram[..len], A, seen).is_err(), "{} bytes", len);
            }
            prop_assert!(receiver.open(&[&datagram[..], &[0; RECORD_LEN]].concat(), A, seen).is_err());
        }
    }

    #[test]
    fn another_term_node_cluster_or_key_is_refused() {
        let confirm = Confirm {
            flow: FlowKey::default(),
            client_isn: 1,
            ack: 2,
            edge: 3,
            sack: Sack::default(),
        };
        let (receiver, seen) = (b(), PromptSeen::default());
        let refused = |mut sender: Prompts, from| {
            let datagram = seal(&mut sender, &[confirm]).remove(0);
            receiver.open(&datagram, from, seen).unwrap_err()
        };
        for term in [
            Term { epoch: 8, ..TERM },
            Term {
                own_session: 0,
                ..TERM
            },
            Term {
                peer_session: 0,
                ..TERM
            },
        ] {
            assert_eq!(refused(end(A, B, Some(term)), A), SyncError::BadMac);
        }
        // Its own words, sent back to it.
        assert_eq!(refused(b(), A), SyncError::BadMac);
        let unknown = SyncError::UnknownNode { found: B };
        assert_eq!(refused(a(), B), unknown);
        for (key, cluster) in [(KEY, "other"), (&[7; 32], "demo")] {
            let mut sender = Prompts::new(key, cluster, A, B, 9501);
            sender.set_term(Some(TERM));
            assert_eq!(refused(sender, A), SyncError::BadMac);
        }
        // While there is no term nothing is said, and nothing heard: not by a key of zeros either.
        assert!(seal(&mut end(A, B, None), &[confirm]).is_empty());
        let mut datagram = seal(&mut a(), &[confirm]).remove(0);
        let end_of_message = datagram.len() - TAG_LEN;
        let zeros = tag([0; 2], &datagram[..end_of_message]);
        datagram[end_of_message..].copy_from_slice(&zeros);
        let deaf = end(B, A, None);
        assert_eq!(
            deaf.open(&datagram, A, seen).unwrap_err(),
            SyncError::BadMac
        );
    }

    #[test]
    fn a_new_term_begins_anew_in_the_other_element() {
        let mut active = b();
        let term = of_b(Term { epoch: 8, ..TERM });
        let (first, agreeing) = active.set_term(Some(term)).unwrap();
        assert_eq!(active.set_term(Some(term)), None, "as before");
        let (second, agreed) = active.set_term(Some(of_b(TERM))).unwrap();
        assert_ne!(
            (agreeing.giving, agreeing.taking),
            (agreed.giving, agreed.taking)
        );
        assert_ne!(agreed.taking, second.key);
        assert_eq!(first.seen ^ second.seen, 1);
        assert_ne!(first.key, second.key);
        let (nobody, none) = active.set_term(None).unwrap();
        assert_eq!(none, AgreePeer::default());
        assert_eq!((nobody.key, nobody.port, nobody.peer), ([0; 2], 0, 0));
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let confirm = Confirm {
            flow: FlowKey {
                client_addr: 0x0102_0304,
                client_port: 0x0506,
                service_port: 0x0708,
            },
            client_isn: 0x090a_0b0c,
            ack: 0x0d0e_0f10,
            edge: 0x1112_1314,
            sack: Sack::default(),
        };
        let mut sender = a();
        seal(&mut sender, &[confirm]);
        let datagram = seal(&mut sender, &[confirm]).remove(0);
        let record: Vec<u8> = (1..=20).chain([0; 4]).collect();
        let sequence = 2_u64.to_be_bytes();
        let expected = [b"RFSP\x02\0\0\0", &[0; 8], &sequence[..], &record].concat();
        assert_eq!(datagram[..48], expected);
        assert_eq!(datagram.len(), 64);
    }

    #[test]
    fn the_kernels_datagrams_are_those_of_the_agent_and_count_in_the_same_sequence() {
        let (mut sender, receiver) = (a(), b());
        let shared = Words::own(1);
        sender.share(shared.clone());
        let confirm = Confirm {
            flow: FlowKey {
                client_addr: 1,
                client_port: 2,
                service_port: 3,
            },
            client_isn: 4,
            ack: 5,
            edge: 6,
            sack: Sack::default(),
        };
        let record = PromptRecord {
            flow: confirm.flow,
            client_isn: confirm.client_isn,
            confirmation: Confirmation::new(confirm.ack, confirm.edge),
        };
        let own = seal(&mut sender, &[confirm]).remove(0);
        let sequence = shared.get(0).unwrap();
        assert_eq!(sequence.fetch_add(1, Ordering::SeqCst), 1);
        let key = sender.agreeing().prompting;
        let bytes = |words: prompt::One| -> Vec<u8> {
            words.into_iter().flat_map(u64::to_ne_bytes).collect()
        };
        assert_eq!(bytes(prompt::seal(&record, 1, false, key)), own);
        let mut seen = PromptSeen::default();
        let mut kernels = bytes(prompt::seal(&record, 2, true, key));
        // A device has finished the checksum.
        kernels[8..10].copy_from_slice(&[7, 7]);
        let later = seal(&mut sender, &[confirm]).remove(0);
        for datagram in [own, kernels, later] {
            let (said, now) = receiver.open(&datagram, A, seen).unwrap();
            assert_eq!(said, [confirm]);
            seen = now;
        }
        assert_eq!((seen.highest, sender.sealed_by_programs()), (3, 1));
    }
}
