//! A whole network in one process, on a virtual clock: clients, the active, its standby's [`Flows`],
//! the node that takes over, and a lossy wire between them with a tap.
//!
//! ```text
//!  client stack ──► wire (loss, jitter, duplicates) ──► hub ──► active stack | heir's kernel
//!                                                        └────► tap (loss, swaps) ──► Flows
//! ```
//!
//! Everything that a live shadow sends is checked against what the flow's active had promised.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::net::Ipv4Addr;

use rfsis_common::maps::{Direction, FlowKey, HeldEvent};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{
    HardwareAddress, IpAddress, IpCidr, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use super::{Effects, Flows, FlowsConfig, TakeoverReport};
use crate::handler::{HandlerKind, StreamHandler, chargen_fill};
use crate::heartbeat::Nanos;
use crate::lockstep::{before, distance, later};
use crate::segment::{Segment, flow_key, parse};
use crate::wire::{emit_packet, instant};

pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 50);
pub const ECHO: u16 = 7;
pub const DISCARD: u16 = 9;
pub const DAYTIME: u16 = 13;
pub const CHARGEN: u16 = 19;
pub const MTU: usize = 1500;
pub const MS: Nanos = 1_000_000;
use super::SECOND;

/// Deterministic numbers (SplitMix64).
#[derive(Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn happens(&mut self, per_mille: u64) -> bool {
        per_mille > 0 && self.below(1000) < per_mille
    }
}

pub fn config() -> FlowsConfig {
    FlowsConfig {
        vip: VIP,
        services: HashMap::from([
            (ECHO, HandlerKind::Echo),
            (DISCARD, HandlerKind::Discard),
            (DAYTIME, HandlerKind::Daytime),
            (CHARGEN, HandlerKind::Chargen),
        ]),
        max_flows: 20_000,
        max_bytes: 256 << 20,
        idle_timeout: 3600 * SECOND,
        mtu: MTU,
    }
}

// The stacks.

#[derive(Default)]
struct Nic {
    rx: VecDeque<Vec<u8>>,
    tx: Vec<Vec<u8>>,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        let packet = self.rx.pop_front()?;
        Some((Rx(packet), Tx(&mut self.tx)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = MTU;
        caps
    }
}

thread_local! {
    static TICKS: Cell<u32> = const { Cell::new(0) };
}

fn client_ticks() -> u32 {
    TICKS.get().wrapping_add(0x7fff_0000)
}

fn active_ticks() -> u32 {
    TICKS.get().wrapping_add(0xffff_fff0)
}

/// What a connection's ends may use, and where their numbers start.
#[derive(Clone, Copy, Debug)]
pub struct Tweaks {
    pub timestamps: bool,
    pub window_scale: bool,
    pub sack: bool,
    pub client_isn: Option<u32>,
    pub active_isn: Option<u32>,
    pub client_buffer: usize,
    pub active_buffer: usize,
}

impl Default for Tweaks {
    fn default() -> Self {
        Self {
            timestamps: true,
            window_scale: true,
            sack: true,
            client_isn: None,
            active_isn: None,
            client_buffer: 256 * 1024,
            active_buffer: 256 * 1024,
        }
    }
}

/// A stack behind an edge that renumbers: smoltcp's initial sequence numbers cannot be chosen.
struct Host {
    nic: Nic,
    iface: Interface,
    sockets: SocketSet<'static>,
    wanted: HashMap<u16, u32>,
    shifts: HashMap<u16, u32>,
    plain: HashMap<u16, Tweaks>,
    is_client: bool,
}

impl Host {
    fn new(address: Ipv4Addr, seed: u64, now: Nanos, is_client: bool) -> Self {
        let mut nic = Nic::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut iface = Interface::new(config, &mut nic, instant(now));
        iface.update_ip_addrs(|list| {
            list.push(IpCidr::new(IpAddress::Ipv4(address), 0)).unwrap();
        });
        Self {
            nic,
            iface,
            sockets: SocketSet::new(vec![]),
            wanted: HashMap::new(),
            shifts: HashMap::new(),
            plain: HashMap::new(),
            is_client,
        }
    }

    fn receive(&mut self, packet: &[u8]) {
        let packet = rewrite(packet, |repr| {
            let port = if self.is_client {
                repr.dst_port
            } else {
                repr.src_port
            };
            let shift = self.shifts.get(&port).copied().unwrap_or(0);
            if let Some(ack) = &mut repr.ack_number {
                ack.0 = (ack.0 as u32).wrapping_sub(shift) as i32;
            }
            for (left, right) in repr.sack_ranges.iter_mut().flatten() {
                *left = left.wrapping_sub(shift);
                *right = right.wrapping_sub(shift);
            }
        });
        self.nic.rx.push_back(packet);
    }

    fn poll(&mut self, now: Nanos) -> Vec<Vec<u8>> {
        self.iface
            .poll(instant(now), &mut self.nic, &mut self.sockets);
        let sent = std::mem::take(&mut self.nic.tx);
        sent.into_iter()
            .map(|packet| self.renumber(&packet))
            .collect()
    }

    fn renumber(&mut self, packet: &[u8]) -> Vec<u8> {
        rewrite(packet, |repr| {
            let port = if self.is_client {
                repr.src_port
            } else {
                repr.dst_port
            };
            if repr.control == TcpControl::Syn {
                let isn = repr.seq_number.0 as u32;
                let shift = self
                    .wanted
                    .get(&port)
                    .map_or(0, |wanted| wanted.wrapping_sub(isn));
                self.shifts.insert(port, shift);
                if let Some(tweaks) = self.plain.get(&port) {
                    repr.sack_permitted &= tweaks.sack;
                    repr.window_scale = repr.window_scale.filter(|_| tweaks.window_scale);
                }
            }
            let shift = self.shifts.get(&port).copied().unwrap_or(0);
            repr.seq_number.0 = (repr.seq_number.0 as u32).wrapping_add(shift) as i32;
        })
    }

    fn poll_at(&mut self, now: Nanos) -> Nanos {
        match self.iface.poll_at(instant(now), &self.sockets) {
            Some(at) => ((at.total_micros().max(0) as u64) * 1000).max(now + 10_000),
            None => Nanos::MAX,
        }
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

/// Changes a TCP header, keeps the rest.
pub fn rewrite(packet: &[u8], change: impl FnOnce(&mut TcpRepr<'_>)) -> Vec<u8> {
    let caps = ChecksumCapabilities::default();
    let ip = Ipv4Packet::new_checked(packet).unwrap();
    let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
    let (from, to) = (ip.src_addr(), ip.dst_addr());
    let mut repr = TcpRepr::parse(&tcp, &from.into(), &to.into(), &caps).unwrap();
    change(&mut repr);
    let mut bytes = Vec::new();
    emit_packet(&mut bytes, from, to, &repr, &caps);
    bytes
}

fn socket(buffer: usize, ticks: Option<fn() -> u32>) -> Socket<'static> {
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; buffer]),
        SocketBuffer::new(vec![0; buffer]),
    );
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket.set_tsval_generator(ticks);
    socket
}

// The applications.

/// A connection's server on a stack.
struct Server {
    handle: SocketHandle,
    handler: Box<dyn StreamHandler>,
    input: Vec<u8>,
    done: bool,
}

impl Server {
    /// Drives the handler as far as it goes; says what it wrote.
    fn run(&mut self, host: &mut Host) -> Vec<u8> {
        let socket = host.socket(self.handle);
        let mut wrote = Vec::new();
        if !socket.may_send() || self.done {
            let _ = socket.recv(|data| (data.len(), ()));
            return wrote;
        }
        loop {
            if self.input.len() < 16 * 1024 && socket.can_recv() {
                let input = &mut self.input;
                let _ = socket.recv(|data| {
                    input.extend_from_slice(data);
                    (data.len(), ())
                });
            }
            let eof = !socket.may_recv() && socket.recv_queue() == 0;
            let (handler, input) = (&mut self.handler, &self.input);
            let progress = socket
                .send(|room| {
                    let progress = handler.advance(input, eof, room);
                    wrote.extend_from_slice(&room[..progress.produced]);
                    (progress.produced, progress)
                })
                .unwrap_or_default();
            self.input.drain(..progress.consumed);
            if progress.finished {
                socket.close();
                self.done = true;
                return wrote;
            }
            if progress.consumed == 0 && progress.produced == 0 {
                return wrote;
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// FIN behind the last byte of the upload; then everything until the server's FIN.
    HalfClose,
    /// FIN once everything that is wanted has come.
    Close,
    /// RST once everything that is wanted has come.
    Abort,
    /// FIN after the server's FIN and not before this time.
    AfterServer { not_before: Nanos },
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub service: u16,
    pub upload: u64,
    pub want: u64,
    pub ending: Ending,
    /// Reads this much at once, this often; nothing before `reads_from`.
    pub read: (usize, Nanos),
    pub reads_from: Nanos,
    /// Writes this much at once, this often.
    pub write: (usize, Nanos),
}

impl Plan {
    pub fn echo(bytes: u64) -> Self {
        Self {
            service: ECHO,
            upload: bytes,
            want: bytes,
            ending: Ending::Close,
            read: (usize::MAX, 0),
            reads_from: 0,
            write: (usize::MAX, 0),
        }
    }

    pub fn chargen(bytes: u64) -> Self {
        Self {
            service: CHARGEN,
            upload: 0,
            ending: Ending::Abort,
            ..Self::echo(bytes)
        }
    }

    pub fn discard(bytes: u64) -> Self {
        Self {
            service: DISCARD,
            want: 0,
            ending: Ending::HalfClose,
            ..Self::echo(bytes)
        }
    }

    pub fn daytime(not_before: Nanos) -> Self {
        Self {
            service: DAYTIME,
            upload: 0,
            want: 22,
            ending: Ending::AfterServer { not_before },
            ..Self::echo(0)
        }
    }

    pub fn half_close(self) -> Self {
        Self {
            ending: Ending::HalfClose,
            ..self
        }
    }

    pub fn slow(self, chunk: usize, every: Nanos) -> Self {
        Self {
            read: (chunk, every),
            ..self
        }
    }

    pub fn typed(self, chunk: usize, every: Nanos) -> Self {
        Self {
            write: (chunk, every),
            ..self
        }
    }
}

/// Byte `at` of what the client behind `port` sends.
pub fn byte(port: u16, at: u64) -> u8 {
    let x = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (u64::from(port) << 17);
    (x ^ (x >> 29)) as u8
}

pub struct Conn {
    pub port: u16,
    pub plan: Plan,
    handle: SocketHandle,
    pub sent: u64,
    pub got: u64,
    text: Vec<u8>,
    next_read: Nanos,
    next_write: Nanos,
    pub ended: bool,
    pub reset: bool,
    pub eof: bool,
}

impl Conn {
    pub fn flow(&self) -> FlowKey {
        flow_key(CLIENT, self.port, self.plan.service)
    }

    fn run(&mut self, host: &mut Host, now: Nanos) {
        let socket = host.socket(self.handle);
        if now >= self.next_write && self.sent < self.plan.upload && socket.can_send() {
            let left = self.plan.upload - self.sent;
            let limit = (self.plan.write.0 as u64).min(left) as usize;
            let (port, from) = (self.port, self.sent);
            let count = socket
                .send(|room| {
                    let count = room.len().min(limit);
                    for (at, slot) in room[..count].iter_mut().enumerate() {
                        *slot = byte(port, from + at as u64);
                    }
                    (count, count)
                })
                .unwrap();
            self.sent += count as u64;
            self.next_write = now + self.plan.write.1;
        }
        if now >= self.next_read.max(self.plan.reads_from) && socket.can_recv() {
            let mut limit = self.plan.read.0;
            while limit > 0 && socket.can_recv() {
                let mut data = vec![0; limit.min(65_536)];
                let count = socket.recv_slice(&mut data).unwrap();
                data.truncate(count);
                limit -= count;
                self.check(&data);
            }
            self.next_read = now + self.plan.read.1;
        }
        let drained = socket.recv_queue() == 0;
        if drained
            && !self.eof
            && matches!(
                socket.state(),
                State::CloseWait | State::Closing | State::TimeWait | State::LastAck
            )
        {
            self.eof = true;
            assert!(
                self.got >= self.plan.want && self.sent == self.plan.upload,
                "port {}: the server's FIN came after {} of {} bytes",
                self.port,
                self.got,
                self.plan.want
            );
        }
        let uploaded = self.sent == self.plan.upload;
        let satisfied = uploaded && self.got >= self.plan.want;
        match self.plan.ending {
            _ if self.ended || socket.state() == State::SynSent => {}
            Ending::HalfClose if uploaded => {
                socket.close();
                self.ended = true;
            }
            Ending::Close if satisfied => {
                socket.close();
                self.ended = true;
            }
            Ending::Abort if satisfied => {
                socket.abort();
                self.ended = true;
            }
            Ending::AfterServer { not_before } if self.eof && now >= not_before => {
                socket.close();
                self.ended = true;
            }
            _ => {}
        }
        if socket.state() == State::Closed && !self.ended {
            self.reset = true;
        }
    }

    fn check(&mut self, data: &[u8]) {
        let mut expected = vec![0; data.len()];
        match self.plan.service {
            ECHO => {
                for (at, slot) in expected.iter_mut().enumerate() {
                    *slot = byte(self.port, self.got + at as u64);
                }
            }
            CHARGEN => chargen_fill(self.got, &mut expected),
            DAYTIME => {
                self.text.extend_from_slice(data);
                expected.copy_from_slice(data);
            }
            service => panic!("service {service} sent {} bytes", data.len()),
        }
        let at = self.got;
        if let Some(wrong) = (0..data.len()).find(|&i| data[i] != expected[i]) {
            panic!(
                "port {}: a wrong byte at offset {}",
                self.port,
                at + wrong as u64
            );
        }
        self.got += data.len() as u64;
    }

    fn wakes_at(&self, now: Nanos) -> Nanos {
        let mut at = Nanos::MAX;
        for time in [self.next_read, self.next_write, self.plan.reads_from] {
            if time > now {
                at = at.min(time);
            }
        }
        if let Ending::AfterServer { not_before } = self.plan.ending
            && not_before > now
        {
            at = at.min(not_before);
        }
        at
    }
}

// What a flow was promised, and what the live shadow does.

#[derive(Debug, Default)]
struct Track {
    client_isn: u32,
    mss: usize,
    sack: bool,
    timestamps: bool,
    scaled: bool,
    shift: u8,
    client_sack: bool,
    client_timestamps: bool,
    client_scaled: bool,
    answered: bool,
    ack: Option<u32>,
    edge: Option<u32>,
    tsval: Option<u32>,
    /// What the tap showed of the client, without holes from the start, and behind holes.
    shown: u64,
    behind: BTreeMap<u64, u64>,
    fin: Option<u64>,
}

impl Track {
    fn of_syn(segment: &Segment<'_>) -> Self {
        Self {
            client_isn: segment.seq,
            mss: usize::from(segment.options.mss.unwrap_or(536)),
            client_sack: segment.options.sack_permitted,
            client_timestamps: segment.options.timestamp.is_some(),
            client_scaled: segment.options.window_scale.is_some(),
            ..Self::default()
        }
    }

    fn active(&mut self, segment: &Segment<'_>) {
        if segment.syn {
            self.answered = true;
            self.sack = self.client_sack && segment.options.sack_permitted;
            self.timestamps = self.client_timestamps && segment.options.timestamp.is_some();
            self.scaled = self.client_scaled && segment.options.window_scale.is_some();
            self.shift = segment
                .options
                .window_scale
                .filter(|_| self.scaled)
                .unwrap_or(0);
        }
        let Some(ack) = segment.ack.filter(|_| !segment.rst) else {
            return;
        };
        self.promise(ack, segment);
    }

    fn promise(&mut self, ack: u32, segment: &Segment<'_>) {
        let shift = if segment.syn { 0 } else { self.shift };
        let edge = ack.wrapping_add(u32::from(segment.window) << shift);
        self.ack = Some(self.ack.map_or(ack, |a| later(a, ack)));
        self.edge = Some(self.edge.map_or(edge, |e| later(e, edge)));
        if let Some((tsval, _)) = segment.options.timestamp {
            self.tsval = Some(self.tsval.map_or(tsval, |t| later(t, tsval)));
        }
    }

    fn show(&mut self, segment: &Segment<'_>) {
        let start = i64::from(distance(self.client_isn.wrapping_add(1), segment.seq));
        if segment.syn || segment.rst || start < 0 {
            return;
        }
        let end = start as u64 + segment.payload.len() as u64;
        if segment.fin {
            self.fin = Some(end);
        }
        self.behind
            .entry(start as u64)
            .and_modify(|e| *e = end.max(*e))
            .or_insert(end);
        while let Some(entry) = self.behind.first_entry() {
            if *entry.key() > self.shown {
                break;
            }
            self.shown = self.shown.max(entry.remove());
        }
    }

    /// Everything that a client could hold against a live shadow.
    fn judge(&mut self, segment: &Segment<'_>, raw: &[u8]) {
        if segment.rst {
            return;
        }
        let ack = segment.ack.expect("a segment without ACK");
        let first = self.client_isn.wrapping_add(1);
        let held = self.shown + u64::from(self.fin.is_some_and(|fin| fin <= self.shown));
        assert!(
            i64::from(distance(first, ack)) <= held as i64,
            "acknowledges {} bytes of {held}",
            distance(first, ack)
        );
        if let Some(promised) = self.ack {
            assert!(!before(ack, promised), "the acknowledgement goes back");
        }
        let shift = if segment.syn { 0 } else { self.shift };
        let edge = ack.wrapping_add(u32::from(segment.window) << shift);
        if let Some(promised) = self.edge {
            let slack = (1 << self.shift) - 1;
            assert!(
                distance(promised, edge) >= -slack,
                "the window shrinks by {}",
                distance(edge, promised)
            );
        }
        let options = segment.options;
        if segment.syn {
            assert!(self.client_sack || !options.sack_permitted);
            assert!(self.client_scaled || options.window_scale.is_none());
        } else {
            assert!(options.mss.is_none() && options.window_scale.is_none());
            let tcp = TcpPacket::new_checked(&raw[20..]).unwrap();
            let blocks = tcp.selective_ack_ranges().unwrap();
            assert!(
                self.sack || blocks.iter().all(Option::is_none),
                "SACK not negotiated"
            );
            for (left, right) in blocks.into_iter().flatten() {
                let l = u64::from(left.wrapping_sub(first));
                let r = u64::from(right.wrapping_sub(first));
                assert!(
                    self.behind.iter().any(|(s, _)| *s <= l) && l > self.shown && r > l,
                    "SACK of {l}..{r}, {} shown",
                    self.shown
                );
            }
        }
        assert_eq!(
            options.timestamp.is_some(),
            self.timestamps,
            "timestamps as negotiated"
        );
        if let (Some((tsval, _)), Some(last)) = (options.timestamp, self.tsval) {
            assert!(
                !before(tsval, last),
                "the timestamp steps back from {last} to {tsval}"
            );
        }
        let room = self.mss - if self.timestamps { 12 } else { 0 };
        assert!(
            segment.payload.len() <= room,
            "{} bytes of data",
            segment.payload.len()
        );
        self.promise(ack, segment);
    }
}

/// The world that the flows act on.
#[derive(Debug, Default)]
pub struct World {
    pub live: HashSet<FlowKey>,
    pub approved: HashSet<FlowKey>,
    pub sent: Vec<Vec<u8>>,
    pub sent_count: usize,
    pub resets: Vec<FlowKey>,
    pub warmed: usize,
    pub live_limit: Option<usize>,
    tracks: HashMap<FlowKey, Track>,
}

impl Effects for World {
    fn send(&mut self, packet: &[u8]) {
        let (flow, segment) = parse(packet, Direction::FromVip).expect("a sound packet");
        assert!(packet.len() <= MTU, "{} bytes on the wire", packet.len());
        assert!(
            !(segment.fin || segment.rst) || self.approved.contains(&flow),
            "FIN or RST without approval"
        );
        if segment.rst {
            self.resets.push(flow);
        }
        if segment.syn {
            self.approved.remove(&flow);
        }
        if let Some(track) = self.tracks.get_mut(&flow).filter(|track| track.answered) {
            track.judge(&segment, packet);
        }
        self.sent_count += 1;
        self.sent.push(packet.to_vec());
    }

    fn approve(&mut self, flow: FlowKey) {
        self.approved.insert(flow);
    }

    fn protect(&mut self, flow: FlowKey) -> bool {
        let full = self
            .live_limit
            .is_some_and(|limit| self.live.len() >= limit);
        if full && !self.live.contains(&flow) {
            return false;
        }
        self.live.insert(flow);
        true
    }

    fn release(&mut self, flow: FlowKey) {
        self.live.remove(&flow);
    }

    fn warm(&mut self, _: Ipv4Addr) {
        self.warmed += 1;
    }
}

// The network.

/// Per mille, but for the times (ns).
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub loss: u64,
    pub duplicates: u64,
    pub jitter: Nanos,
    pub tap_loss: u64,
    pub tap_swaps: u64,
}

/// Decides on one segment: true loses it.
pub type Filter = Box<dyn FnMut(&Segment<'_>, Direction) -> bool>;

pub struct Lab {
    pub now: Nanos,
    pub events: u64,
    rng: Rng,
    pub faults: Faults,
    wire: BinaryHeap<Reverse<(Nanos, u64, Direction2, Vec<u8>)>>,
    posted: u64,
    client: Host,
    active: Option<Host>,
    heir: Host,
    servers: Vec<Server>,
    heir_servers: Vec<Server>,
    pub conns: Vec<Conn>,
    pub flows: Flows,
    pub world: World,
    taken_over: bool,
    tap_waiting: Option<(Vec<u8>, Direction)>,
    pub lose: Filter,
    pub lose_copy: Filter,
    /// Flows whose RST reached a client that was not through with them.
    pub told: Vec<FlowKey>,
    /// What an active of another mind runs.
    pub other_mind: Option<HandlerKind>,
}

/// [`Direction`], ordered so that it can be in a heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Direction2 {
    ToVip,
    FromVip,
}

impl From<Direction2> for Direction {
    fn from(direction: Direction2) -> Self {
        match direction {
            Direction2::ToVip => Direction::ToVip,
            Direction2::FromVip => Direction::FromVip,
        }
    }
}

impl Lab {
    pub fn new(seed: u64) -> Self {
        Self::with_config(seed, config())
    }

    pub fn with_config(seed: u64, config: FlowsConfig) -> Self {
        let now = SECOND;
        Self {
            now,
            events: 0,
            rng: Rng(seed),
            faults: Faults::default(),
            wire: BinaryHeap::new(),
            posted: 0,
            client: Host::new(CLIENT, seed ^ 1, now, true),
            active: Some(Host::new(VIP, seed ^ 2, now, false)),
            heir: Host::new(VIP, seed ^ 3, now, false),
            servers: vec![],
            heir_servers: vec![],
            conns: vec![],
            flows: Flows::new(config).unwrap(),
            world: World::default(),
            taken_over: false,
            tap_waiting: None,
            lose: Box::new(|_, _| false),
            lose_copy: Box::new(|_, _| false),
            told: vec![],
            other_mind: None,
        }
    }

    /// Opens a connection; the server's side listens on whoever is active.
    pub fn connect(&mut self, plan: Plan, tweaks: Tweaks) -> usize {
        let port = 40_000 + self.conns.len() as u16;
        self.connect_from(port, plan, tweaks)
    }

    pub fn connect_from(&mut self, port: u16, plan: Plan, tweaks: Tweaks) -> usize {
        let kind = config().services[&plan.service];
        let active_ticks = tweaks.timestamps.then_some(active_ticks as fn() -> u32);
        let mut listener = socket(tweaks.active_buffer, active_ticks);
        listener.listen((VIP, plan.service)).unwrap();
        let handler = self.other_mind.unwrap_or(kind).stream();
        let (host, servers) = match &mut self.active {
            Some(active) => (active, &mut self.servers),
            None => (&mut self.heir, &mut self.heir_servers),
        };
        let handle = host.sockets.add(listener);
        servers.push(Server {
            handle,
            handler,
            input: vec![],
            done: false,
        });
        if let Some(isn) = tweaks.active_isn {
            host.wanted.insert(port, isn);
        }

        let ticks = tweaks.timestamps.then_some(client_ticks as fn() -> u32);
        let mut socket = socket(tweaks.client_buffer, ticks);
        socket
            .connect(self.client.iface.context(), (VIP, plan.service), port)
            .unwrap();
        self.client.plain.insert(port, tweaks);
        self.client.wanted.remove(&port);
        if let Some(isn) = tweaks.client_isn {
            self.client.wanted.insert(port, isn);
        }
        let handle = self.client.sockets.add(socket);
        self.conns.push(Conn {
            port,
            plan,
            handle,
            sent: 0,
            got: 0,
            text: vec![],
            next_read: 0,
            next_write: 0,
            ended: false,
            reset: false,
            eof: false,
        });
        self.conns.len() - 1
    }

    pub fn client_state(&mut self, conn: usize) -> State {
        let handle = self.conns[conn].handle;
        self.client.socket(handle).state()
    }

    /// A packet of a stack or a shadow enters the wire.
    fn post(&mut self, packet: Vec<u8>, direction: Direction2) {
        let (_, segment) = parse(&packet, direction.into()).expect("a sound packet");
        if std::env::var("LAB_TRACE").is_ok() && self.events < 100000 { eprintln!("{:.4} {direction:?} seq {} ack {:?} win {} len {} {}{}{} {:?}", self.now as f64/1e9, segment.seq, segment.ack, segment.window, segment.payload.len(), if segment.syn {"S"} else {""}, if segment.fin {"F"} else {""}, if segment.rst {"R"} else {""}, segment.options.timestamp); }
        if (self.lose)(&segment, direction.into()) || self.rng.happens(self.faults.loss) {
            return;
        }
        let copies = 1 + u64::from(self.rng.happens(self.faults.duplicates));
        for _ in 0..copies {
            let delay = 50_000 + self.rng.below(self.faults.jitter + 1);
            self.posted += 1;
            let entry = (self.now + delay, self.posted, direction, packet.clone());
            self.wire.push(Reverse(entry));
        }
    }

    fn arrive(&mut self, packet: &[u8], direction: Direction2) {
        let (flow, segment) = parse(packet, direction.into()).expect("a sound packet");
        match direction {
            Direction2::ToVip => {
                if segment.syn {
                    let tracks = &mut self.world.tracks;
                    if tracks
                        .get(&flow)
                        .is_none_or(|t| t.client_isn != segment.seq)
                    {
                        tracks.insert(flow, Track::of_syn(&segment));
                    }
                }
                if !self.taken_over || self.world.live.contains(&flow) {
                    self.tap(packet, direction.into());
                } else {
                    self.heir.receive(packet);
                }
                if let Some(active) = &mut self.active {
                    active.receive(packet);
                }
            }
            Direction2::FromVip => {
                if !self.taken_over {
                    self.tap(packet, direction.into());
                }
                if segment.rst
                    && let Some(conn) = self.conns.iter().rfind(|conn| conn.flow() == flow)
                    && !conn.ended
                {
                    self.told.push(flow);
                }
                self.client.receive(packet);
            }
        }
    }

    fn tap(&mut self, packet: &[u8], direction: Direction) {
        let (_, segment) = parse(packet, direction).expect("a sound packet");
        let faulty = !self.taken_over;
        if faulty
            && ((self.lose_copy)(&segment, direction) || self.rng.happens(self.faults.tap_loss))
        {
            return;
        }
        if faulty && self.tap_waiting.is_none() && self.rng.happens(self.faults.tap_swaps) {
            self.tap_waiting = Some((packet.to_vec(), direction));
            return;
        }
        self.show(packet, direction);
        self.flush_tap();
    }

    fn flush_tap(&mut self) {
        if let Some((packet, direction)) = self.tap_waiting.take() {
            self.show(&packet, direction);
        }
    }

    /// The standby gets a copy.
    pub fn show(&mut self, packet: &[u8], direction: Direction) {
        if let Ok((flow, segment)) = parse(packet, direction)
            && let Some(track) = self.world.tracks.get_mut(&flow)
        {
            match direction {
                Direction::ToVip => track.show(&segment),
                Direction::FromVip => track.active(&segment),
            }
        }
        self.flows
            .process_frame(packet, direction, self.now, &mut self.world);
        self.collect();
    }

    fn collect(&mut self) {
        for packet in std::mem::take(&mut self.world.sent) {
            self.post(packet, Direction2::FromVip);
        }
    }

    /// The next thing happens.
    pub fn step(&mut self) {
        let now = self.now;
        let mut at = self.wire.peek().map_or(Nanos::MAX, |Reverse((at, ..))| *at);
        at = at.min(self.client.poll_at(now)).min(self.heir.poll_at(now));
        if let Some(active) = &mut self.active {
            at = at.min(active.poll_at(now));
        }
        at = at.min(self.flows.next_wakeup().max(now));
        for conn in &self.conns {
            at = at.min(conn.wakes_at(now));
        }
        self.now = at.max(now);
        self.events += 1;
        TICKS.set((self.now / MS) as u32);
        if let Some(Reverse((due, ..))) = self.wire.peek()
            && *due <= self.now
            && let Some(Reverse((_, _, direction, packet))) = self.wire.pop()
        {
            self.arrive(&packet, direction);
        }
        self.run_hosts();
        if self.now >= self.flows.next_wakeup() {
            self.flows.poll(self.now, &mut self.world);
            self.collect();
        }
    }

    fn run_hosts(&mut self) {
        for _ in 0..2 {
            for packet in self.client.poll(self.now) {
                self.post(packet, Direction2::ToVip);
            }
            for conn in &mut self.conns {
                conn.run(&mut self.client, self.now);
            }
            if let Some(active) = &mut self.active {
                for server in &mut self.servers {
                    server.run(active);
                }
                let sent = active.poll(self.now);
                for packet in sent {
                    self.post(packet, Direction2::FromVip);
                }
            }
        }
        for server in &mut self.heir_servers {
            server.run(&mut self.heir);
        }
        for packet in self.heir.poll(self.now) {
            self.leave_heir(packet);
        }
    }

    /// What the heir's kernel says goes through the gate.
    fn leave_heir(&mut self, packet: Vec<u8>) {
        let (flow, segment) = parse(&packet, Direction::FromVip).unwrap();
        if segment.syn {
            self.world.approved.remove(&flow);
        }
        if (segment.fin || segment.rst) && !self.world.approved.contains(&flow) {
            let held = HeldEvent {
                flow,
                seq: segment.seq,
                ack: segment.ack.unwrap_or(0),
                flags: if segment.rst { 4 } else { 1 } | if segment.ack.is_some() { 16 } else { 0 },
                ..HeldEvent::default()
            };
            self.flows.process_held(&held, &mut self.world);
            self.collect();
            return;
        }
        self.post(packet, Direction2::FromVip);
    }

    pub fn run_until(&mut self, limit: Nanos, mut reached: impl FnMut(&mut Lab) -> bool) -> bool {
        let end = self.now.saturating_add(limit);
        while self.now < end {
            if reached(self) {
                return true;
            }
            self.step();
        }
        reached(self)
    }

    pub fn run_for(&mut self, time: Nanos) {
        let end = self.now + time;
        self.run_until(time, |lab| lab.now >= end);
    }

    /// The active falls silent; what it sent is still on its way.
    pub fn crash(&mut self) {
        self.active = None;
        self.servers.clear();
    }

    /// The standby becomes active.
    pub fn take_over(&mut self) -> TakeoverReport {
        self.flush_tap();
        self.taken_over = true;
        let report = self.flows.go_live(self.now, &mut self.world);
        self.collect();
        report
    }

    /// Crash now, detection after `pause`.
    pub fn fail_over(&mut self, pause: Nanos) -> TakeoverReport {
        self.crash();
        self.run_for(pause);
        self.take_over()
    }

    fn is_done(&mut self, conn: usize) -> bool {
        let state = self.client_state(conn);
        let conn = &self.conns[conn];
        conn.ended && conn.got >= conn.plan.want && matches!(state, State::Closed | State::TimeWait)
    }

    /// Everybody gets what it wanted, nobody is reset, and nothing is left behind.
    pub fn finish(&mut self) {
        let count = self.conns.len();
        let done = self.run_until(900 * SECOND, |lab| {
            (0..count).all(|conn| lab.is_done(conn) || lab.conns[conn].reset)
        });
        for index in 0..count {
            let state = self.client_state(index);
            let conn = &self.conns[index];
            assert!(
                !conn.reset,
                "port {} was reset after {} bytes",
                conn.port, conn.got
            );
            assert!(
                done,
                "port {}: sent {} of {}, got {} of {}, {state}, {:?}",
                conn.port,
                conn.sent,
                conn.plan.upload,
                conn.got,
                conn.plan.want,
                self.flows.flows.get(&conn.flow())
            );
            assert!(conn.got >= conn.plan.want);
        }
        assert_eq!(self.told, [], "nobody is reset");
        self.clear();
    }

    /// What has ended is forgotten in time.
    pub fn clear(&mut self) {
        self.run_for(130 * SECOND);
        assert!(
            self.world.live.is_empty(),
            "left in LIVE_FLOWS: {:?}, {:?}",
            self.world.live,
            self.flows.flows
        );
        assert_eq!(self.flows.bytes, 0, "bytes are still counted");
    }
}

/// A segment by hand.
pub fn by_hand(repr: &TcpRepr<'_>, direction: Direction) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (from, to) = match direction {
        Direction::ToVip => (CLIENT, VIP),
        Direction::FromVip => (VIP, CLIENT),
    };
    emit_packet(&mut bytes, from, to, repr, &ChecksumCapabilities::default());
    bytes
}

/// A sequence number for smoltcp.
pub fn seq(number: u32) -> TcpSeqNumber {
    TcpSeqNumber(number as i32)
}
