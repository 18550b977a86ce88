//! The shadow path from memory, no kernel involved: `cargo bench -p rfsis-agent`.
//!
//! Prints a table: frames per second on one core (best of several passes), memory per idle flow,
//! what a takeover costs with 1 and with 10 000 idle flows, and what a sync datagram costs.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Instant;

use rfsis_agent::adopt::{Numbers, Unfinished};
use rfsis_agent::flows::{Effects, Flows, FlowsConfig};
use rfsis_agent::handler::HandlerKind;
use rfsis_agent::segment::flow_key;
use rfsis_agent::sync::{Channel, Confirm, Record, Sack};
use rfsis_agent::sys;
use rfsis_agent::wire::{bare_repr, emit_packet};
use rfsis_common::maps::{Direction, FlowKey};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber};

const VIP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);
const PAYLOAD: usize = 1448;
const FRAMES: usize = 400_000;
const PASSES: usize = 5;

/// Counts what would be sent.
#[derive(Default)]
struct Count {
    packets: usize,
}

impl Effects for Count {
    type Socket = ();
    fn may_adopt(&self) -> bool {
        true
    }
    fn restore(&mut self, _: &Numbers) -> Option<()> {
        None
    }
    fn adopt(&mut self, _: FlowKey, (): (), _: Unfinished) {}
    fn send(&mut self, packet: &[u8]) {
        black_box(packet);
        self.packets += 1;
    }
    fn approve(&mut self, _: FlowKey) {}
    fn protect(&mut self, _: FlowKey) -> bool {
        true
    }
    fn release(&mut self, _: FlowKey) {}
    fn warm(&mut self, _: Ipv4Addr) {}
}

fn packet(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), repr: TcpRepr<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let repr = TcpRepr {
        src_port: from.1,
        dst_port: to.1,
        window_len: 65_535,
        ..repr
    };
    emit_packet(
        &mut bytes,
        from.0,
        to.0,
        &repr,
        &ChecksumCapabilities::default(),
    );
    bytes
}

fn flows(kind: HandlerKind) -> Flows {
    Flows::new(FlowsConfig {
        vip: VIP,
        services: [(7, kind)].into(),
        max_flows: 20_000,
        max_bytes: 1 << 30,
        idle_timeout: u64::MAX,
        mtu: 1500,
        guarded: false,
        copied: false,
    })
    .expect("smoltcp answers a SYN")
}

const CLIENT_ISN: u32 = 1000;
const ACTIVE_ISN: u32 = 900_000;

fn number(value: u32) -> TcpSeqNumber {
    TcpSeqNumber(value as i32)
}

/// Completes the handshake of one client.
fn connect(flows: &mut Flows, client: (Ipv4Addr, u16), fx: &mut Count) {
    let service = (VIP, 7);
    let syn = TcpRepr {
        seq_number: number(CLIENT_ISN),
        max_seg_size: Some(1460),
        ..bare_repr(0, 0, TcpControl::Syn)
    };
    let answer = TcpRepr {
        seq_number: number(ACTIVE_ISN),
        ack_number: Some(number(CLIENT_ISN + 1)),
        max_seg_size: Some(1460),
        ..bare_repr(0, 0, TcpControl::Syn)
    };
    let ack = TcpRepr {
        seq_number: number(CLIENT_ISN + 1),
        ack_number: Some(number(ACTIVE_ISN + 1)),
        ..bare_repr(0, 0, TcpControl::None)
    };
    flows.process_frame(&packet(client, service, syn), Direction::ToVip, 1, fx);
    flows.process_frame(&packet(service, client, answer), Direction::FromVip, 1, fx);
    flows.process_frame(&packet(client, service, ack), Direction::ToVip, 1, fx);
}

/// Frames per second of one upload; for `echo` the client acknowledges what comes back.
fn ingest(kind: HandlerKind) -> f64 {
    let mut best: f64 = 0.0;
    for _ in 0..PASSES {
        let mut flows = flows(kind);
        let mut fx = Count::default();
        let client = (Ipv4Addr::new(192, 168, 1, 50), 40_000);
        connect(&mut flows, client, &mut fx);
        let payload = [0x5a; PAYLOAD];
        let frames: Vec<Vec<u8>> = (0..FRAMES)
            .map(|i| {
                let sent = (i * PAYLOAD) as u32;
                let echoed = if kind == HandlerKind::Echo { sent } else { 0 };
                let repr = TcpRepr {
                    seq_number: number((CLIENT_ISN + 1).wrapping_add(sent)),
                    ack_number: Some(number((ACTIVE_ISN + 1).wrapping_add(echoed))),
                    payload: &payload,
                    ..bare_repr(0, 0, TcpControl::Psh)
                };
                packet(client, (VIP, 7), repr)
            })
            .collect();
        let start = Instant::now();
        for frame in &frames {
            black_box(flows.process_frame(frame, Direction::ToVip, 2, &mut fx));
        }
        best = best.max(FRAMES as f64 / start.elapsed().as_secs_f64());
        let census = flows.census();
        assert_eq!((census.lockstep, census.lag_bytes), (1, 0));
    }
    best
}

/// Resident memory of this process, bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has /proc");
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .expect("every process has a VmRSS");
    let kib: usize = line
        .split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .expect("VmRSS is a number of kB");
    kib * 1024
}

/// A table with `count` flows that have exchanged one line and fallen idle.
fn idle(count: usize) -> (Flows, f64) {
    let before = resident();
    let mut flows = flows(HandlerKind::Echo);
    let mut fx = Count::default();
    for i in 0..count {
        let client = (Ipv4Addr::new(192, 168, 1, 50), 20_000 + i as u16);
        connect(&mut flows, client, &mut fx);
        let line = TcpRepr {
            seq_number: number(CLIENT_ISN + 1),
            ack_number: Some(number(ACTIVE_ISN + 1)),
            payload: b"hello\n",
            ..bare_repr(0, 0, TcpControl::Psh)
        };
        let heard = TcpRepr {
            seq_number: number(CLIENT_ISN + 7),
            ack_number: Some(number(ACTIVE_ISN + 7)),
            ..bare_repr(0, 0, TcpControl::None)
        };
        let answered = TcpRepr {
            seq_number: number(ACTIVE_ISN + 1),
            ack_number: Some(number(CLIENT_ISN + 7)),
            payload: b"hello\n",
            ..bare_repr(0, 0, TcpControl::Psh)
        };
        let service = (VIP, 7);
        flows.process_frame(&packet(client, service, line), Direction::ToVip, 2, &mut fx);
        flows.process_frame(
            &packet(service, client, answered),
            Direction::FromVip,
            2,
            &mut fx,
        );
        flows.process_frame(
            &packet(client, service, heard),
            Direction::ToVip,
            2,
            &mut fx,
        );
    }
    flows.poll(3, &mut fx);
    assert_eq!(flows.census().lockstep, count);
    let each = (resident().saturating_sub(before)) as f64 / count as f64;
    (flows, each)
}

/// Seconds of `go_live`, best of several.
fn takeover(count: usize) -> (f64, usize) {
    let mut best = f64::MAX;
    let mut spoke = 0;
    for _ in 0..PASSES {
        let (mut flows, _) = idle(count);
        let mut fx = Count::default();
        let start = Instant::now();
        let report = flows.go_live(4, &mut fx);
        best = best.min(start.elapsed().as_secs_f64());
        assert_eq!((report.live, report.resets.len()), (count, 0));
        spoke = report.spoke;
    }
    (best, spoke)
}

/// Nanoseconds to seal and to open a datagram with so many confirmations, best of several.
fn sync(confirmations: u32) -> (f64, f64) {
    const DATAGRAMS: usize = 1_000;
    let (node, peer) = (Ipv4Addr::new(192, 168, 1, 1), Ipv4Addr::new(192, 168, 1, 2));
    let key = [7; 32];
    let (mut sealing, mut opening) = (f64::MAX, f64::MAX);
    for _ in 0..PASSES {
        let mut sender = Channel::new(&key, "bench", node, peer, 1);
        sender.set_peer(Some(2));
        let mut receiver = Channel::new(&key, "bench", peer, node, 2);
        receiver.set_peer(Some(1));
        let confirms = |ack| {
            (0..confirmations).map(move |client| {
                Record::Confirm(Confirm {
                    flow: flow_key(Ipv4Addr::from(client), 40_000, 7),
                    client_isn: CLIENT_ISN,
                    ack,
                    edge: ack + 65_535,
                    sack: Sack::default(),
                })
            })
        };
        let mut datagrams = Vec::with_capacity(DATAGRAMS);
        for ack in 0..DATAGRAMS as u32 {
            sender.seal(1, false, confirms(ack), |datagram| {
                datagrams.push(datagram.to_vec());
            });
        }
        assert_eq!(datagrams.len(), DATAGRAMS, "one datagram holds them");
        let start = Instant::now();
        for ack in 0..DATAGRAMS as u32 {
            sender.seal(1, false, confirms(ack), |datagram| {
                black_box(datagram);
            });
        }
        sealing = sealing.min(start.elapsed().as_nanos() as f64);
        let start = Instant::now();
        for datagram in &datagrams {
            let opened = receiver.open(datagram, node, 1);
            let records = opened.expect("sealed by the peer").records;
            assert_eq!(black_box(records.count()), confirmations as usize);
        }
        opening = opening.min(start.elapsed().as_nanos() as f64);
    }
    (sealing / DATAGRAMS as f64, opening / DATAGRAMS as f64)
}

/// One line for the summary, as the other benchmarks print it: `=> what | measured | target | met?`.
fn figure(what: &str, measured: &str, target: Option<(&str, bool)>) {
    let (target, met) = match target {
        Some((target, true)) => (target, "yes"),
        Some((target, false)) => (target, "**no**"),
        None => ("–", "–"),
    };
    println!("=> {what} | {measured} | {target} | {met}");
}

fn main() {
    sys::map_large_buffers();
    assert_eq!(
        flow_key(Ipv4Addr::LOCALHOST, 1, 7).service_port,
        7,
        "keys are in host byte order"
    );
    println!("### The shadow path from memory, one core, best of {PASSES} passes\n");
    println!("| what | measured |");
    println!("|---|---|");
    let (table, each) = idle(10_000);
    drop(table);
    let kib = each / 1024.0;
    println!("| memory per idle flow at 10,000 | {kib:.1} KiB |");
    let rates = [HandlerKind::Discard, HandlerKind::Echo].map(|kind| {
        let (name, rate) = (kind.as_str(), ingest(kind));
        let millions = rate / 1e6;
        println!("| ingest, {PAYLOAD}-byte payload, {name} | {millions:.2} M frames/s |");
        (name, rate)
    });
    for count in [1, 10_000] {
        let (seconds, spoke) = takeover(count);
        let millis = seconds * 1e3;
        println!(
            "| all shadows live, {count} idle flows ({spoke} had to speak) | {millis:.3} ms |"
        );
    }
    for confirmations in [1, 40] {
        let (seal, open) = sync(confirmations);
        println!(
            "| sync datagram, confirmations: {confirmations} | sealed {seal:.0} ns, opened {open:.0} ns |"
        );
    }
    println!();
    let (size, target) = (format!("{kib:.1} KiB"), ("≤ 16 KiB", kib <= 16.0));
    figure(
        "memory of a shadow's flow, idle, at 10,000",
        &size,
        Some(target),
    );
    for (name, rate) in rates {
        let speed = format!("{:.2} M frames/s", rate / 1e6);
        let target = ("≥ 1 M frames/s", rate >= 1e6);
        figure(
            &format!("ingest from memory, {PAYLOAD} bytes, {name}"),
            &speed,
            Some(target),
        );
    }
}
