//! The ACK gate's decisions, whatever the order of segments and confirmations.

use proptest::collection::vec;
use proptest::prelude::*;
use rfsis_common::ack_gate::{
    AckVerdict, Confirmation, Outgoing, Sent, ack_decide, note_open, note_release, release,
};
use rfsis_common::frame::tcp_flags::{ACK, FIN};

/// Window of the SYN-ACK, bytes.
const FIRST_WINDOW: u16 = 64_240;

/// What the active's kernel, the standby or the agent does next. Numbers are bytes.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The client's bytes came in; said later.
    Arrive(u32),
    /// A pure ACK, and so much more room.
    Ack(u32),
    /// Data, with the ACK that is due.
    Data(u32, u32),
    /// A keep-alive or window probe.
    Probe,
    /// The end of the active's data.
    Fin,
    /// The standby holds so much more, and has so much more room; one or the other hears it.
    Confirm(u32, u32, bool),
    /// One or the other hears what was confirmed so many times ago.
    Late(usize, bool),
    /// The agent looks whether something is pending.
    Release,
    /// A segment while the gate is open.
    Open(u32),
}

fn step(with_open: bool) -> impl Strategy<Value = Step> {
    let bytes = || prop_oneof![0..4_u32, 0..3000_u32, 0..200_000_u32];
    prop_oneof![
        4 => bytes().prop_map(Step::Arrive),
        4 => bytes().prop_map(Step::Ack),
        3 => (1..3000_u32, bytes()).prop_map(|(len, room)| Step::Data(len, room)),
        1 => Just(Step::Probe),
        1 => Just(Step::Fin),
        4 => (bytes(), bytes(), any::<bool>())
            .prop_map(|(ack, room, who)| Step::Confirm(ack, room, who)),
        2 => (0..8_usize, any::<bool>()).prop_map(|(ago, who)| Step::Late(ago, who)),
        3 => Just(Step::Release),
        u32::from(with_open) => bytes().prop_map(Step::Open),
    ]
}

/// Sequence numbers as counts from the client's first byte, so that they are ordered.
struct History {
    shift: u32,
    client_isn: u32,
    sent: Sent,
    /// The kernel's next sequence number.
    seq: u32,
    /// What the kernel has received; what of it it said, and the edge that it offered.
    received: u64,
    said: u64,
    offered: u64,
    /// The kernel sent a FIN.
    ended: bool,
    /// What is confirmed.
    held: u64,
    room: u64,
    /// The same as the agent has noted it, and the programs by themselves.
    confirmed: [Confirmation; 2],
    /// What was confirmed once.
    earlier: Vec<Confirmation>,
    /// What the client was told.
    told: u64,
    told_edge: u64,
    /// The gate was open.
    opened: bool,
}

impl History {
    fn new(client_isn: u32, active_isn: u32, shift: u32) -> Self {
        let edge = u64::from(FIRST_WINDOW);
        let first = client_isn.wrapping_add(1);
        let confirmed = Confirmation::new(first, first.wrapping_add(FIRST_WINDOW.into()));
        Self {
            confirmed: [confirmed; 2],
            earlier: Vec::new(),
            shift,
            client_isn,
            sent: Sent::new(client_isn, active_isn, FIRST_WINDOW),
            seq: active_isn.wrapping_add(1),
            received: 0,
            said: 0,
            offered: edge,
            ended: false,
            held: 0,
            room: edge,
            told: 0,
            told_edge: edge,
            opened: false,
        }
    }

    fn wire(&self, count: u64) -> u32 {
        self.client_isn.wrapping_add(1).wrapping_add(count as u32)
    }

    /// The count nearest to what the client was told.
    fn count(&self, number: u32) -> i64 {
        let distance = number.wrapping_sub(self.wire(self.told)).cast_signed();
        self.told as i64 + i64::from(distance)
    }

    fn confirmation(&self) -> Confirmation {
        let [agent, programs] = self.confirmed;
        let both = agent.with(programs);
        assert_eq!(both, self.latest());
        both
    }

    fn latest(&self) -> Confirmation {
        Confirmation::new(self.wire(self.held), self.wire(self.room))
    }

    fn hear_of(&mut self, confirmation: Confirmation, who: bool) {
        let known = &mut self.confirmed[usize::from(who)];
        *known = known.with(confirmation);
    }

    fn unit(&self) -> i64 {
        1 << self.shift
    }

    /// A segment as Linux makes it: its window never shrinks, and is rounded up (`tcp_select_window`).
    fn segment(&mut self, flags: u8, seq: u32, payload: u32, more_room: u32) -> Outgoing {
        let most = u64::from(u16::MAX) << self.shift;
        let wanted = (self.offered + u64::from(more_room)).min(self.received + most);
        let units = (wanted.max(self.received) - self.received).div_ceil(1 << self.shift);
        let window = units.min(u64::from(u16::MAX)) as u16;
        self.said = self.received;
        self.offered = self.received + (u64::from(window) << self.shift);
        Outgoing {
            flags,
            seq,
            ack: self.wire(self.received),
            window,
            payload,
            has_timestamp: true,
            tsval: 7,
            tsecr: 9,
        }
    }

    /// What left reaches the client.
    fn hear(&mut self, ack: u32, window: u16) {
        let ack = self.count(ack);
        let edge = ack + (i64::from(window) << self.shift);
        let (most_ack, most_edge) = (self.held.max(self.told), self.room.max(self.told_edge));
        assert!(ack <= most_ack as i64, "{ack} told, {most_ack} confirmed");
        assert!(edge <= most_edge as i64, "{edge} told, {most_edge} is room");
        if !self.opened {
            assert!(ack <= self.held as i64 && edge <= self.room as i64);
        }
        assert!(ack >= self.told as i64, "an old ACK: {ack}");
        let shrunk = self.told_edge as i64 - edge;
        assert!(shrunk < self.unit(), "the edge shrank by {shrunk}");
        self.told = ack as u64;
        self.told_edge = self.told_edge.max(edge as u64);
    }

    fn guarded(&mut self, segment: Outgoing) {
        let pure = segment.payload == 0 && segment.flags == ACK && segment.seq == self.seq;
        let confirmation = self.confirmation();
        let decision = ack_decide(&segment, &mut self.sent, confirmation, self.shift);
        match decision.verdict {
            AckVerdict::Held => {
                assert!(pure, "held: {segment:?}");
                assert!(self.received > self.held.max(self.told), "held in vain");
            }
            AckVerdict::Lowered => {
                assert!(!pure, "a lowered pure ACK is a duplicate");
                self.hear(decision.ack, decision.window);
            }
            AckVerdict::Passed => {
                assert_eq!(decision.ack, segment.ack);
                self.hear(decision.ack, decision.window);
            }
        }
    }

    fn release(&mut self) {
        let Some(released) = release(&self.sent, self.confirmation(), self.shift) else {
            assert!(self.told >= self.said.min(self.held), "an ACK is lost");
            // No field tells more than that.
            let widest = self.told + (u64::from(u16::MAX) << self.shift);
            let edge = self.offered.min(self.room).min(widest) as i64;
            let reached = self.told_edge as i64 + self.unit();
            assert!(edge < reached, "an edge is lost");
            return;
        };
        assert_eq!(released.seq, self.seq);
        assert_eq!(released.timestamp, Some((7, 9)));
        let (told, edge) = (self.told, self.told_edge);
        self.hear(released.ack, released.window);
        assert!(
            self.told > told || self.told_edge > edge,
            "it tells nothing new"
        );
        let segment = Outgoing {
            flags: ACK,
            seq: released.seq,
            ack: released.ack,
            window: released.window,
            ..Outgoing::default()
        };
        note_release(&segment, &mut self.sent, self.shift);
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Arrive(len) => {
                // No more than the client was allowed to send.
                let len = u64::from(len).min(self.told_edge.saturating_sub(self.received));
                self.received += len;
            }
            Step::Ack(room) => {
                let segment = self.segment(ACK, self.seq, 0, room);
                self.guarded(segment);
            }
            Step::Data(len, room) if !self.ended => {
                let segment = self.segment(ACK, self.seq, len, room);
                self.guarded(segment);
                self.seq = self.seq.wrapping_add(len);
            }
            Step::Probe => {
                let segment = self.segment(ACK, self.seq.wrapping_sub(1), 0, 0);
                self.guarded(segment);
            }
            Step::Fin if !self.ended => {
                let segment = self.segment(ACK | FIN, self.seq, 0, 0);
                self.guarded(segment);
                self.seq = self.seq.wrapping_add(1);
                self.ended = true;
            }
            Step::Data(..) | Step::Fin => {}
            Step::Confirm(len, room, who) => {
                self.earlier.push(self.latest());
                // The copy may be there before the kernel's own.
                self.held = (self.held + u64::from(len))
                    .min(self.told_edge)
                    .max(self.held);
                self.room = self.room.max(self.held) + u64::from(room);
                self.hear_of(self.latest(), who);
            }
            Step::Late(ago, who) => {
                if let Some(earlier) = self.earlier.iter().rev().nth(ago) {
                    self.hear_of(*earlier, who);
                }
            }
            Step::Release => self.release(),
            Step::Open(room) => {
                let segment = self.segment(ACK, self.seq, 0, room);
                note_open(&segment, &mut self.sent, self.shift);
                self.opened = true;
                self.told = self.received;
                self.told_edge = self.told_edge.max(self.offered);
            }
        }
        assert_eq!(self.sent.next, self.seq);
        assert_eq!(self.sent.told, self.wire(self.told));
        assert_eq!(self.sent.told_edge, self.wire(self.told_edge));
    }

    /// Everything is confirmed in the end: what was held is told, and nothing twice.
    fn finish(&mut self) {
        let shift = self.shift;
        if self.said != self.received {
            self.run(Step::Ack(0));
        }
        self.held = self.held.max(self.received);
        self.room = self.room.max(self.offered);
        self.hear_of(self.latest(), true);
        self.release();
        assert_eq!(self.told, self.received);
        assert_eq!(release(&self.sent, self.confirmation(), shift), None);
        assert_eq!(release(&self.sent, self.sent.everything(), shift), None);
    }
}

fn play(start: (u32, u32, u32), steps: &[Step]) {
    let (client_isn, active_isn, shift) = start;
    let mut history = History::new(client_isn, active_isn, shift);
    for step in steps {
        history.run(*step);
    }
    history.finish();
}

/// Initial numbers, near the wrap too, and a shift.
fn start() -> impl Strategy<Value = (u32, u32, u32)> {
    let isn = || prop_oneof![any::<u32>(), (u32::MAX - 300_000)..=u32::MAX];
    (isn(), isn(), 0..=14_u32)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_told_before_it_is_confirmed_and_everything_after(
        start in start(),
        steps in vec(step(false), 0..120),
    ) {
        play(start, &steps);
    }

    #[test]
    fn what_was_told_by_an_open_gate_is_neither_taken_back_nor_exceeded(
        start in start(),
        steps in vec(step(true), 0..120),
    ) {
        play(start, &steps);
    }
}

#[test]
fn nobody_adds_to_an_open_gate_and_zeros_say_nothing() {
    let some = Confirmation::new(7, 9);
    assert!(Confirmation::OPEN.with(some).is_open());
    assert_eq!(some.with(Confirmation::default()), some);
    assert_eq!(Confirmation::default().with(some), some);
    let ahead = Confirmation::new(u32::MAX - 5, u32::MAX);
    assert_eq!(ahead.with(some), some, "past the wrap");
    assert_eq!(some.with(ahead), some);
}

fn at(ack: u32, window: u16) -> Outgoing {
    Outgoing {
        flags: ACK,
        seq: 5001,
        ack,
        window,
        ..Outgoing::default()
    }
}

#[test]
fn an_rst_is_lowered_and_ends_all_releases_and_one_without_ack_tells_nothing() {
    use rfsis_common::frame::tcp_flags::RST;
    let mut sent = Sent::new(1000, 5000, FIRST_WINDOW);
    let confirmed = Confirmation::new(1001, 100_000);
    ack_decide(&at(1500, 1000), &mut sent, confirmed, 0);
    let stray = Outgoing {
        flags: RST,
        seq: 77,
        ..Outgoing::default()
    };
    let mut other = sent;
    let decision = ack_decide(&stray, &mut other, confirmed, 0);
    assert_eq!(decision.verdict, AckVerdict::Passed);
    assert_eq!((decision.ack, decision.window), (0, 0));
    assert_eq!((other.next, other.ack, other.told), (5001, 1500, 1001));
    let reset = Outgoing {
        flags: RST | ACK,
        ..at(1500, 1000)
    };
    let decision = ack_decide(&reset, &mut sent, confirmed, 0);
    assert_eq!(
        (decision.verdict, decision.ack),
        (AckVerdict::Lowered, 1001)
    );
    for sent in [sent, other] {
        assert_eq!(release(&sent, sent.everything(), 0), None);
    }
}

#[test]
fn a_lowered_ack_keeps_the_edge_by_a_wider_window() {
    let mut sent = Sent::new(1000, 5000, 1000);
    let confirmed = Confirmation::new(1001, 1 << 20);
    let data = Outgoing {
        payload: 10,
        ..at(3001, 100)
    };
    let decision = ack_decide(&data, &mut sent, confirmed, 7);
    assert_eq!(decision.verdict, AckVerdict::Lowered);
    // 2000 bytes are 15.6 units of 128.
    assert_eq!((decision.ack, decision.window), (1001, 100 + 15));
    let released = release(&sent, Confirmation::new(3001, 1 << 20), 7).unwrap();
    assert_eq!((released.ack, released.window), (3001, 100));
    assert_eq!((released.seq, released.timestamp), (5011, None));
}

#[test]
fn congestion_that_the_kernel_echoes_is_echoed_by_the_released_ack() {
    use rfsis_common::frame::tcp_flags::ECE;
    let mut sent = Sent::new(1000, 5000, 1000);
    let confirmed = Confirmation::new(1001, 1 << 20);
    let echo = Outgoing {
        flags: ACK | ECE,
        ..at(2001, 1000)
    };
    for (segment, ece) in [(echo, true), (at(2001, 1000), false)] {
        let decision = ack_decide(&segment, &mut sent, confirmed, 0);
        assert_eq!(decision.verdict, AckVerdict::Held);
        let released = release(&sent, sent.everything(), 0).unwrap();
        assert_eq!(released.ece, ece);
    }
}
