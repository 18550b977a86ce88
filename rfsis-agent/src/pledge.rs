//! What the standby's agent lets its kernel confirm by itself ([`rfsis_common::pledge`] says what, and why): who has a pledge,
//! and what is left for the agent to say.
//!
//! A shadow has its pledge, and with it ends what was pledged, at whatever place the shadow comes to its end.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rfsis_common::ack_gate::Confirmation;
use rfsis_common::maps::FlowKey;
use rfsis_common::pledge::{HELD, Held, PLEDGES_MAX, Pledged, ROOM, Room, TOLD, WORDS};

use crate::collections::HashMap;
use crate::flows::{Effects, Flows};
use crate::lockstep::{before, distance, later};
use crate::sync::Confirm;

/// Bytes that a client has sent before its flow gets a pledge: those of short connections are not worth the system calls.
pub const PLEDGED_FROM: u64 = 256 * 1024;

/// Of the memory that shadows may still take, pledges claim one part in so many.
const SHARE: usize = 2;

/// Words that agent and programs exchange in the same memory.
#[derive(Clone)]
pub struct Words(Arc<dyn Deref<Target = [AtomicU64]> + Send + Sync>);

impl Words {
    /// Those of a map, or whatever holds them.
    pub fn new(words: impl Deref<Target = [AtomicU64]> + Send + Sync + 'static) -> Self {
        Self(Arc::new(words))
    }

    /// So many of the agent's own, all 0.
    pub fn own(count: usize) -> Self {
        let words: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::default()).collect();
        Self::new(words)
    }

    /// One of them.
    pub fn get(&self, index: usize) -> Option<&AtomicU64> {
        self.0.get(index)
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Words").finish_non_exhaustive()
    }
}

/// What pledges do to the kernel.
pub trait PledgeEffects {
    /// Tells the programs of a flow's pledge; false if there is no room.
    fn pledge(&mut self, flow: FlowKey, pledged: Pledged) -> bool;
    /// Lets them forget it.
    fn retract(&mut self, flow: FlowKey);
}

/// A shadow's pledge.
#[derive(Debug)]
pub struct Pledge {
    words: Words,
    pledged: Pledged,
    /// What the agent has found to be held.
    known: u32,
    /// The active has asked what is held.
    asked: bool,
}

impl Pledge {
    fn word(&self, place: usize) -> Option<&AtomicU64> {
        self.words.get(self.pledged.slot as usize * WORDS + place)
    }

    /// The agent is to answer, whatever the programs say.
    pub fn note_asked(&mut self) {
        self.asked = true;
    }

    /// The shadow holds this; bytes before `limit` will be taken for certain. Returns whether the programs have said so, and
    /// nothing is left to be said.
    fn renew(&mut self, confirm: &Confirm, limit: u32) -> bool {
        let (Some(held), Some(room), Some(told)) =
            (self.word(HELD), self.word(ROOM), self.word(TOLD))
        else {
            return false;
        };
        let order = Ordering::SeqCst;
        room.store(Room::new(limit, confirm.edge).word(), order);
        let own = Held::new(confirm.client_isn, confirm.ack);
        let mut found = held.load(order);
        while before(Held::from_word(found).next(), own.next()) {
            match held.compare_exchange_weak(found, own.word(), order, order) {
                Ok(_) => break,
                Err(other) => found = other,
            }
        }
        let next = Held::from_word(found).next();
        let said = Confirmation::from_word(told.load(order));
        // The programs leave some of it to the agent.
        let is_said = !before(said.ack(), confirm.ack);
        // A client that repeats itself, or only asks, was perhaps not told.
        let is_news = before(self.known, confirm.ack) && !self.asked;
        // Else it would soon wait for more room.
        let has_room = 2 * distance(next, said.edge()) >= distance(confirm.ack, confirm.edge);
        let is_all = is_said && is_news && has_room;
        if !is_all {
            let now = Confirmation::new(later(said.ack(), confirm.ack), confirm.edge);
            // Fails where the programs have just said more.
            let _ = told.compare_exchange(said.word(), now.word(), order, order);
        }
        (self.known, self.asked) = (confirm.ack, false);
        is_all
    }
}

impl Drop for Pledge {
    fn drop(&mut self) {
        if let Some(held) = self.word(HELD) {
            held.store(Held::NOTHING.word(), Ordering::SeqCst);
        }
    }
}

/// All pledges of a standby.
#[derive(Debug)]
pub struct Pledges {
    words: Words,
    spare: Vec<u32>,
    given: HashMap<FlowKey, Pledged>,
    from: u64,
    /// What was held for held when it was looked at last.
    claims: Vec<(FlowKey, Held)>,
    broken: u64,
}

impl Pledges {
    /// No pledge can be given.
    pub fn none() -> Self {
        Self::new(Words::own(0), 0, 0)
    }

    /// In the words of map `PLEDGES`, or of its first `slots` elements; a flow gets one when its client has sent `from` bytes.
    pub fn new(words: Words, slots: u32, from: u64) -> Self {
        Self {
            words,
            spare: (0..slots.min(PLEDGES_MAX)).rev().collect(),
            given: HashMap::default(),
            from,
            claims: Vec::new(),
            broken: 0,
        }
    }

    /// Pledges that were not kept, since the start.
    pub fn broken(&self) -> u64 {
        self.broken
    }

    /// The shadow of a flow is about to confirm this. Returns whether the programs have said it all.
    pub fn is_said(
        &mut self,
        confirm: &Confirm,
        flows: &mut Flows,
        fx: &mut impl PledgeEffects,
    ) -> bool {
        let share = flows.room() / SHARE / self.given.len().max(1);
        let Some(shadow) = flows.pledging(confirm.flow, confirm.client_isn) else {
            return false;
        };
        if shadow.has_fin() {
            *shadow.pledge() = None;
            return false;
        }
        let limit = confirm
            .ack
            .wrapping_add(shadow.storable().min(share) as u32);
        if shadow.pledge().is_none() && shadow.held_bytes() >= self.from {
            *shadow.pledge() = self.give(confirm, fx);
        }
        match shadow.pledge() {
            Some(pledge) => pledge.renew(confirm, limit),
            None => false,
        }
    }

    fn give(&mut self, confirm: &Confirm, fx: &mut impl PledgeEffects) -> Option<Pledge> {
        let older = self.given.remove(&confirm.flow);
        let slot = older.map(|older| older.slot).or_else(|| self.spare.pop())?;
        let pledged = Pledged {
            slot,
            client_isn: confirm.client_isn,
        };
        let pledge = Pledge {
            words: self.words.clone(),
            pledged,
            known: confirm.ack,
            asked: false,
        };
        let order = Ordering::SeqCst;
        // Nothing counts before the last of these.
        pledge
            .word(ROOM)?
            .store(Room::new(confirm.ack, confirm.edge).word(), order);
        let told = Confirmation::new(confirm.ack, confirm.edge);
        pledge.word(TOLD)?.store(told.word(), order);
        if !fx.pledge(confirm.flow, pledged) {
            self.spare.push(slot);
            return None;
        }
        let held = Held::new(confirm.client_isn, confirm.ack);
        pledge.word(HELD)?.store(held.word(), order);
        self.given.insert(confirm.flow, pledged);
        Some(pledge)
    }

    /// Takes back what ended pledges had, and looks whether each shadow holds by now what it was held for at the last call.
    /// One that does not has refused what was in the ring: the active hears that it is not protected. All that was in the
    /// ring then must have been taken since.
    pub fn check(
        &mut self,
        flows: &mut Flows,
        effects: &mut impl Effects,
        fx: &mut impl PledgeEffects,
    ) {
        for (flow, claimed) in self.claims.drain(..) {
            if let Some(shadow) = flows.pledging(flow, claimed.client_isn())
                && shadow.pledge().is_some()
                && before(shadow.held_next(), claimed.next())
            {
                self.broken += 1;
                flows.refuse(flow, effects);
            }
        }
        let words = &self.words;
        let (spare, claims) = (&mut self.spare, &mut self.claims);
        self.given.retain(|flow, pledged| {
            let word = words.get(pledged.slot as usize * WORDS + HELD);
            let held = word.map_or(0, |word| word.load(Ordering::SeqCst));
            let is_given = held != Held::NOTHING.word();
            if is_given {
                claims.push((*flow, Held::from_word(held)));
            } else {
                fx.retract(*flow);
                spare.push(pledged.slot);
            }
            is_given
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rfsis_common::frame::{TcpPart, tcp_flags};

    use super::*;
    use crate::flows::FlowsConfig;
    use crate::segment::{Options, flow_key};
    use crate::simulation::{ECHO, Maps, VIP, World, config};
    use crate::sync::{Open, Record, Sack};
    use crate::wire::{bare_repr, emit_packet};

    const ISN: u32 = 1000;
    const FIRST: u32 = ISN + 1;
    const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);
    const MS: u64 = 1_000_000;

    /// A standby with a shadow, and its kernel.
    struct Standby {
        flows: Flows,
        pledges: Pledges,
        maps: Maps,
        world: World,
    }

    fn flow() -> FlowKey {
        flow_key(CLIENT, 40_000, ECHO)
    }

    fn data(seq: u32, payload: &[u8]) -> Vec<u8> {
        use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber};
        let repr = TcpRepr {
            seq_number: TcpSeqNumber(seq as i32),
            ack_number: Some(TcpSeqNumber(5001)),
            window_len: 60_000,
            payload,
            ..bare_repr(40_000, ECHO, TcpControl::None)
        };
        let mut packet = Vec::new();
        emit_packet(&mut packet, CLIENT, VIP, &repr, &Default::default());
        packet
    }

    impl Standby {
        fn new(from: u64) -> Self {
            let config = FlowsConfig {
                guarded: true,
                copied: true,
                ..config()
            };
            let mut maps = Maps::default();
            maps.agreement.promise = u64::MAX;
            maps.agreement.peer.port = 1;
            let mut standby = Self {
                flows: Flows::new(config).unwrap(),
                pledges: Pledges::new(maps.pledges.clone(), 2, from),
                maps,
                world: World::default(),
            };
            let open = Open {
                flow: flow(),
                client_isn: ISN,
                active_isn: 5000,
                client_window: 60_000,
                client: Options::default(),
                active: Options::default(),
            };
            assert!(standby.flows.process_open(&open, MS, &mut standby.world));
            standby.takes(FIRST, b"");
            standby
        }

        /// The shadow gets what is in the ring.
        fn takes(&mut self, seq: u32, payload: &[u8]) {
            let packet = data(seq, payload);
            self.flows.process_frame(
                &packet,
                rfsis_common::maps::Direction::ToVip,
                MS,
                &mut self.world,
            );
        }

        /// The kernel gets a copy. Whether it confirms it.
        fn confirms(&mut self, seq: u32, len: usize) -> bool {
            let tcp = TcpPart {
                flow: flow(),
                flags: tcp_flags::ACK,
                seq,
                ack: 5001,
                window: 60_000,
                offset: 34,
                header_len: 20,
                payload: len as u32,
            };
            self.maps.confirm_pledged(&tcp, MS).is_some()
        }

        /// What the agent itself has to say.
        fn says(&mut self) -> Vec<Record> {
            let mut said = Vec::new();
            let mut records = Vec::new();
            self.flows.take_confirmations(|record| records.push(record));
            for record in records {
                let is_said = match &record {
                    Record::Confirm(confirm) => {
                        self.pledges
                            .is_said(confirm, &mut self.flows, &mut self.maps)
                    }
                    _ => false,
                };
                if !is_said {
                    said.push(record);
                }
            }
            said
        }

        fn check(&mut self) {
            let (flows, world) = (&mut self.flows, &mut self.world);
            self.pledges.check(flows, world, &mut self.maps);
        }
    }

    fn acks(said: &[Record]) -> Vec<u32> {
        let confirm = |record: &Record| match record {
            Record::Confirm(confirm) => Some(confirm.ack),
            _ => None,
        };
        said.iter().filter_map(confirm).collect()
    }

    #[test]
    fn what_the_kernel_has_said_the_agent_does_not_say_again_but_to_a_client_that_repeats_itself() {
        let mut standby = Standby::new(0);
        assert_eq!(acks(&standby.says()), [FIRST], "by itself, and pledges");
        assert!(standby.confirms(FIRST, 3));
        standby.takes(FIRST, b"abc");
        assert_eq!(standby.says(), []);
        // As the kernel's word may be lost.
        standby.takes(FIRST, b"abc");
        assert!(!standby.confirms(FIRST, 3));
        let said = standby.says();
        assert!(!said.is_empty(), "{said:?}");
        // Of a hole the kernel says nothing; when that is filled the agent goes on for it.
        assert!(!standby.confirms(FIRST + 4, 2));
        standby.takes(FIRST + 4, b"ef");
        standby.says();
        assert!(standby.confirms(FIRST + 3, 1));
        standby.takes(FIRST + 3, b"d");
        assert_eq!(acks(&standby.says()), [FIRST + 6]);
        assert!(standby.confirms(FIRST + 6, 1));
    }

    #[test]
    fn the_agent_answers_when_it_is_asked_and_when_the_client_will_soon_want_room() {
        let mut standby = Standby::new(0);
        standby.says();
        assert!(standby.confirms(FIRST, 3));
        standby.takes(FIRST, b"abc");
        assert!(standby.flows.process_told(flow(), ISN, FIRST + 3));
        assert_eq!(acks(&standby.says()), [FIRST + 3], "asked");
        assert!(standby.confirms(FIRST + 3, 3));
        standby.takes(FIRST + 3, b"def");
        // As if the kernel had told less.
        let told = standby.maps.pledges.get(TOLD).unwrap();
        let said = Confirmation::from_word(told.load(Ordering::SeqCst));
        let near = Confirmation::new(said.ack(), said.edge() - (1 << 20) - 100);
        told.store(near.word(), Ordering::SeqCst);
        assert_eq!(acks(&standby.says()), [FIRST + 6], "room");
    }

    #[test]
    fn what_the_kernel_leaves_the_agent_says_and_the_kernel_goes_on_from_there() {
        const LONG: usize = 40_000;
        let bytes = vec![7; LONG];
        let mut standby = Standby::new(0);
        standby.says();
        let mut seq = FIRST;
        let mut next = |standby: &mut Standby, is_due| {
            assert_eq!(standby.confirms(seq, LONG), is_due);
            standby.takes(seq, &bytes);
            seq += LONG as u32;
        };
        next(&mut standby, true);
        assert_eq!(standby.says(), []);
        next(&mut standby, false);
        assert_eq!(acks(&standby.says()), [FIRST + 2 * LONG as u32]);
        next(&mut standby, false);
        next(&mut standby, true);
        assert_eq!(standby.says(), [], "all said when the agent reads both");
    }

    #[test]
    fn a_short_connection_gets_no_pledge_and_one_whose_client_has_ended_none_any_more() {
        let mut standby = Standby::new(4);
        standby.takes(FIRST, b"abc");
        standby.says();
        assert!(!standby.confirms(FIRST + 3, 1));
        standby.takes(FIRST + 3, b"d");
        standby.says();
        assert!(standby.confirms(FIRST + 4, 1));
        standby.takes(FIRST + 4, b"e");
        let mut fin = data(FIRST + 5, b"");
        fin[33] |= 1;
        crate::segment::complete_checksum(&mut fin);
        let direction = rfsis_common::maps::Direction::ToVip;
        standby
            .flows
            .process_frame(&fin, direction, MS, &mut standby.world);
        assert_eq!(acks(&standby.says()), [FIRST + 6]);
        assert!(!standby.confirms(FIRST + 6, 1));
    }

    #[test]
    fn a_pledge_ends_with_its_shadow_and_another_connection_can_have_it() {
        let mut standby = Standby::new(0);
        standby.says();
        assert!(standby.confirms(FIRST, 3));
        standby.flows.process_close(flow(), ISN, &mut standby.world);
        assert!(!standby.confirms(FIRST + 3, 3));
        assert_eq!(standby.maps.pledged.len(), 1);
        standby.check();
        assert!(standby.maps.pledged.is_empty());
        assert_eq!(standby.pledges.spare.len(), 2);

        let mut standby = Standby::new(0);
        standby.says();
        standby.flows.go_live(MS, &mut standby.world);
        assert!(!standby.confirms(FIRST, 3), "live");
    }

    #[test]
    fn a_shadow_that_lacks_what_was_confirmed_is_called_unprotected() {
        let mut standby = Standby::new(0);
        standby.says();
        assert!(standby.confirms(FIRST, 3));
        standby.check();
        standby.takes(FIRST, b"abc");
        standby.says();
        standby.check();
        assert_eq!(standby.says(), [], "it has come");
        assert!(standby.confirms(FIRST + 3, 3));
        standby.check();
        assert_eq!(standby.says(), [], "it may still be in the ring");
        standby.check();
        let refused = Record::Refuse {
            flow: flow(),
            client_isn: ISN,
        };
        assert_eq!(standby.says(), [refused]);
        assert_eq!(standby.pledges.broken(), 1);
        assert!(standby.world.live.is_empty());
        assert!(!standby.confirms(FIRST + 6, 3));
    }

    #[test]
    fn no_more_is_pledged_than_shadows_can_store() {
        let mut standby = Standby::new(0);
        standby.says();
        standby.takes(FIRST, b"abc");
        standby.says();
        let room = Room::from_word(
            standby
                .maps
                .pledges
                .get(ROOM)
                .unwrap()
                .load(Ordering::SeqCst),
        );
        let most = room.limit() - FIRST - 3;
        assert!(
            most > 0 && most as usize <= standby.flows.room() / SHARE,
            "{most}"
        );
    }

    #[test]
    fn without_room_nothing_is_pledged() {
        let confirm = |port| Confirm {
            flow: flow_key(CLIENT, port, ECHO),
            client_isn: ISN,
            ack: FIRST,
            edge: FIRST + 1000,
            sack: Sack::default(),
        };
        let mut maps = Maps::default();
        let mut pledges = Pledges::new(maps.pledges.clone(), 2, 0);
        let given: Vec<_> = (1..=3)
            .map(|port| pledges.give(&confirm(port), &mut maps))
            .collect();
        assert_eq!(given.iter().flatten().count(), 2);
        assert!(Pledges::none().give(&confirm(1), &mut maps).is_none());
    }
}
