//! One flow, any order of segments from both sides, beside a reassembler that is too simple to be wrong.
//!
//! What the standby confirms is what the reassembler holds: never a byte more, for the client would not send
//! it again; nor less, for the client would wait. What the shadow says after a takeover is what the service
//! was sent.

#![no_main]

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::net::Ipv4Addr;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rfsis_agent::adopt::{Numbers, Unfinished};
use rfsis_agent::flows::{Effects, Flows, FlowsConfig};
use rfsis_agent::handler::HandlerKind;
use rfsis_agent::segment::{self, Options, flow_key};
use rfsis_agent::sync::{Open, Record};
use rfsis_agent::wire::{bare_repr, emit_packet};
use rfsis_common::maps::{Direction, FlowKey};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber, TcpTimestampRepr};

const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 50);
const PORT: u16 = 40_000;
const ECHO: u16 = 7;
const MS: u64 = 1_000_000;

/// The client sends no more than this, bytes: everything is inside the first window.
const STREAM: usize = 48 * 1024;

#[derive(Arbitrary, Debug)]
struct Input {
    client_isn: u32,
    active_isn: u32,
    timestamps: bool,
    scale: Option<u8>,
    sack: bool,
    steps: Vec<Step>,
    after: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// The client sends bytes from this place of its stream on.
    Data { from: u16, len: u16, window: u16 },
    /// The bytes that the client has not sent yet, or a hole.
    Next { len: u16, window: u16 },
    /// The client acknowledges so many of the echoed bytes, and some more.
    Ack { beyond: i16, window: u16 },
    /// The client has no more to say.
    Fin,
    /// The active's kernel echoes.
    Echo { from: u16, len: u16, ack: i16 },
    /// A segment at any place without data.
    Wild {
        to_vip: bool,
        seq: u32,
        ack: u32,
        window: u16,
    },
    /// Time passes, ms.
    Wait(u16),
}

/// Which byte the client sends at which place.
fn byte(place: usize) -> u8 {
    (place.wrapping_mul(2_654_435_761) >> 13) as u8
}

/// The client's stream as it arrived.
#[derive(Default)]
struct Reassembler {
    held: Vec<bool>,
    contiguous: usize,
    fin: Option<usize>,
}

impl Reassembler {
    fn take(&mut self, from: usize, len: usize) {
        self.held.resize(self.held.len().max(from + len), false);
        self.held[from..from + len].fill(true);
        let held = self.held[self.contiguous..].iter();
        self.contiguous += held.take_while(|held| **held).count();
    }

    fn contiguous(&self) -> usize {
        self.contiguous
    }

    /// Sequence numbers without a hole.
    fn next(&self) -> usize {
        let bytes = self.contiguous();
        bytes + usize::from(self.fin == Some(bytes))
    }
}

#[derive(Default)]
struct World {
    sent: Vec<Vec<u8>>,
    live: HashSet<FlowKey>,
}

impl Effects for World {
    type Socket = Infallible;

    // A shadow stays one: it is what is looked at.
    fn may_adopt(&self) -> bool {
        false
    }

    fn restore(&mut self, _: &Numbers) -> Option<Infallible> {
        None
    }

    fn adopt(&mut self, _: FlowKey, socket: Infallible, _: Unfinished) {
        match socket {}
    }

    fn send(&mut self, packet: &[u8]) {
        self.sent.push(packet.to_vec());
    }

    fn approve(&mut self, _: FlowKey) {}

    fn protect(&mut self, flow: FlowKey) -> bool {
        self.live.insert(flow);
        true
    }

    fn release(&mut self, flow: FlowKey) {
        self.live.remove(&flow);
    }

    fn warm(&mut self, _: Ipv4Addr) {}
}

struct Bench {
    input: Input,
    now: u64,
    flows: Flows,
    world: World,
    reference: Reassembler,
    /// Bytes echoed to the client without a hole, as it acknowledges them.
    echoed: usize,
    /// The highest place that the client was told to go to.
    confirmed: usize,
    /// Bytes that the active's kernel has sent.
    spoken: usize,
    /// Nobody has said anything untrue yet.
    honest: bool,
    reset: bool,
}

impl Bench {
    fn options(&self) -> Options {
        Options {
            mss: Some(1460),
            window_scale: self.input.scale.map(|scale| scale % 15),
            sack_permitted: self.input.sack,
            timestamp: self.input.timestamps.then_some((1, 0)),
        }
    }

    fn repr(
        &self,
        direction: Direction,
        control: TcpControl,
        seq: u32,
        ack: Option<u32>,
    ) -> TcpRepr<'static> {
        let (from, to) = match direction {
            Direction::ToVip => (PORT, ECHO),
            Direction::FromVip => (ECHO, PORT),
        };
        let mut repr = bare_repr(from, to, control);
        repr.seq_number = TcpSeqNumber(seq as i32);
        repr.ack_number = ack.map(|ack| TcpSeqNumber(ack as i32));
        repr.window_len = 64_000;
        if self.input.timestamps {
            let ms = (self.now / MS) as u32;
            repr.timestamp = Some(TcpTimestampRepr::new(ms, ms));
        }
        repr
    }

    fn show(&mut self, repr: &TcpRepr<'_>, direction: Direction) {
        let (from, to) = match direction {
            Direction::ToVip => (CLIENT, VIP),
            Direction::FromVip => (VIP, CLIENT),
        };
        let mut packet = Vec::new();
        emit_packet(
            &mut packet,
            from,
            to,
            repr,
            &ChecksumCapabilities::default(),
        );
        self.flows
            .process_frame(&packet, direction, self.now, &mut self.world);
    }

    fn handshake(&mut self) {
        let (client_isn, active_isn) = (self.input.client_isn, self.input.active_isn);
        let options = self.options();
        let with_options = |mut repr: TcpRepr<'static>| {
            repr.max_seg_size = options.mss;
            repr.window_scale = options.window_scale;
            repr.sack_permitted = options.sack_permitted;
            repr
        };
        let syn = self.repr(Direction::ToVip, TcpControl::Syn, client_isn, None);
        self.show(&with_options(syn), Direction::ToVip);
        let open = Open {
            flow: flow_key(CLIENT, PORT, ECHO),
            client_isn,
            active_isn,
            client_window: 64_000,
            client: options,
            active: options,
        };
        assert!(self.flows.process_open(&open, self.now, &mut self.world));
        let ack = Some(client_isn.wrapping_add(1));
        let answer = self.repr(Direction::FromVip, TcpControl::Syn, active_isn, ack);
        self.show(&with_options(answer), Direction::FromVip);
        self.client_says(&[], 0, 0, 64_000);
    }

    fn client_says(&mut self, data: &[u8], from: usize, beyond: i64, window: u16) {
        let seq = self.input.client_isn.wrapping_add(1 + from as u32);
        let ack = self.input.active_isn as i64 + 1 + self.echoed as i64 + beyond;
        let mut repr = self.repr(Direction::ToVip, TcpControl::None, seq, Some(ack as u32));
        repr.payload = data;
        repr.window_len = window;
        self.show(&repr, Direction::ToVip);
    }

    fn data(&mut self, from: usize, len: usize, window: u16) {
        let end = (from + len).min(self.reference.fin.unwrap_or(STREAM));
        let from = from.min(end);
        let bytes: Vec<u8> = (from..end).map(byte).collect();
        self.client_says(&bytes, from, 0, window);
        self.reference.take(from, end - from);
    }

    /// One thing happens.
    fn step(&mut self, step: &Step) {
        self.now += MS / 10;
        let sent = self.reference.held.len();
        match *step {
            Step::Data { from, len, window } => {
                self.data(usize::from(from), usize::from(len) % 1449, window)
            }
            Step::Next { len, window } => self.data(sent, usize::from(len) % 1449, window),
            Step::Ack { beyond, window } => {
                // No more than it was sent, and perhaps an old one that comes late.
                let got = self.spoken.max(self.echoed);
                let beyond = i64::from(beyond).min(got as i64 - self.echoed as i64);
                let beyond = beyond.max(-(self.echoed as i64));
                self.echoed = self.echoed.max((self.echoed as i64 + beyond) as usize);
                let late = beyond.min(0);
                self.client_says(&[], sent, late, window);
            }
            Step::Fin => {
                let fin = *self.reference.fin.get_or_insert(sent.min(STREAM));
                let seq = self.input.client_isn.wrapping_add(1 + fin as u32);
                let ack = self.input.active_isn.wrapping_add(1 + self.echoed as u32);
                let repr = self.repr(Direction::ToVip, TcpControl::Fin, seq, Some(ack));
                self.show(&repr, Direction::ToVip);
            }
            Step::Echo { from, len, ack } => {
                // The active echoes what it was sent.
                let held = self.reference.contiguous();
                let end = (usize::from(from) + usize::from(len) % 1449).min(held);
                let from = usize::from(from).min(end);
                let bytes: Vec<u8> = (from..end).map(byte).collect();
                let acknowledged = (self.confirmed as i64 + i64::from(ack.min(0))).max(0);
                let seq = self.input.active_isn.wrapping_add(1 + from as u32);
                let ack = self.input.client_isn.wrapping_add(1 + acknowledged as u32);
                let mut repr = self.repr(Direction::FromVip, TcpControl::None, seq, Some(ack));
                repr.payload = &bytes;
                self.spoken = self.spoken.max(end);
                self.show(&repr, Direction::FromVip);
            }
            Step::Wild {
                to_vip,
                seq,
                ack,
                window,
            } => {
                let direction = if to_vip {
                    Direction::ToVip
                } else {
                    Direction::FromVip
                };
                // Of the active the standby believes what it says: that is its lockstep.
                if to_vip {
                    self.honest = false;
                    let mut repr = self.repr(direction, TcpControl::None, seq, Some(ack));
                    repr.window_len = window;
                    self.show(&repr, direction);
                }
            }
            Step::Wait(ms) => {
                self.now += u64::from(ms % 1_000) * MS;
                self.flows.poll(self.now, &mut self.world);
                // The client's retransmission timer (RFC 6298).
                let hole = self.reference.contiguous();
                if self.flows.is_live() && hole < sent {
                    self.data(hole, 1448, 64_000);
                }
            }
        }
    }

    /// What the standby confirms is what the reassembler holds.
    fn check(&mut self) {
        let mut latest = None;
        let first = self.input.client_isn.wrapping_add(1);
        let reference = &self.reference;
        self.flows.take_confirmations(|record| {
            if let Record::Confirm(confirm) = record {
                let behind = |(_, right): &&(u32, u32)| {
                    // What was sent again lies before the acknowledgement, which is checked below.
                    right.wrapping_sub(confirm.ack).cast_signed() > 0
                };
                for (left, right) in confirm.sack.blocks().iter().filter(behind) {
                    let range =
                        left.wrapping_sub(first) as usize..right.wrapping_sub(first) as usize;
                    assert!(range.start < range.end && range.end <= reference.held.len());
                    assert!(
                        reference.held[range].iter().all(|held| *held),
                        "a hole is confirmed"
                    );
                }
                latest = Some(confirm.ack.wrapping_sub(first) as usize);
            }
        });
        if let Some(ack) = latest {
            assert_eq!(ack, self.reference.next());
            self.confirmed = ack;
        }
    }

    /// What a live shadow says is the echo of what it was sent, and acknowledges nothing else.
    fn listen(&mut self) {
        for packet in std::mem::take(&mut self.world.sent) {
            let (_, segment) = segment::parse(&packet, Direction::FromVip).expect("a sound packet");
            if segment.rst {
                assert!(!self.honest, "a flow that could go on is reset");
                self.reset = true;
            }
            let place = segment
                .seq
                .wrapping_sub(self.input.active_isn.wrapping_add(1))
                as usize;
            let held = self.reference.contiguous();
            if !segment.payload.is_empty() {
                assert!(
                    place + segment.payload.len() <= held,
                    "more than the service was sent"
                );
            }
            for (offset, found) in segment.payload.iter().enumerate() {
                assert_eq!(*found, byte(place + offset), "at {}", place + offset);
            }
            if let Some(ack) = segment.ack.filter(|_| !self.reset) {
                let ack = ack.wrapping_sub(self.input.client_isn.wrapping_add(1)) as usize;
                assert!(ack <= self.reference.next(), "acknowledges {ack}");
                assert!(ack >= self.confirmed, "takes back what it confirmed");
            }
            if !segment.payload.is_empty() && place <= self.echoed {
                self.echoed = self.echoed.max(place + segment.payload.len());
            }
        }
    }

    /// An honest client that says everything again gets every byte back.
    fn finish(&mut self) {
        let sent = self.reference.fin.unwrap_or(self.reference.held.len());
        for _ in 0..1_000 {
            if !self.honest || self.echoed >= sent {
                return;
            }
            let from = self.reference.contiguous().min(sent);
            for from in (from..sent).step_by(1448) {
                self.data(from, 1448.min(sent - from), 64_000);
            }
            self.listen();
            self.step(&Step::Ack {
                beyond: 0,
                window: 64_000,
            });
            self.listen();
            self.step(&Step::Wait(300));
            self.listen();
        }
        panic!("the client got {} of {sent} bytes", self.echoed);
    }
}

fuzz_target!(|input: Input| {
    let flows = Flows::new(FlowsConfig {
        vip: VIP,
        services: HashMap::from([(ECHO, HandlerKind::Echo)]),
        max_flows: 16,
        max_bytes: 16 << 20,
        idle_timeout: 3600_000 * MS,
        mtu: 1500,
        guarded: true,
        copied: true,
    })
    .unwrap();
    let mut bench = Bench {
        input,
        now: 1_000 * MS,
        flows,
        world: World::default(),
        reference: Reassembler::default(),
        echoed: 0,
        confirmed: 0,
        spoken: 0,
        honest: true,
        reset: false,
    };
    bench.handshake();
    bench.check();
    for step in std::mem::take(&mut bench.input.steps) {
        bench.step(&step);
        bench.check();
    }
    bench.flows.go_live(bench.now, &mut bench.world);
    bench.listen();
    for step in std::mem::take(&mut bench.input.after) {
        if matches!(step, Step::Echo { .. }) {
            continue;
        }
        bench.step(&step);
        bench.listen();
    }
    bench.finish();
});
