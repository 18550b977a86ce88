//! A host: smoltcp behind an edge that renumbers.

use super::*;

#[derive(Default)]
pub(crate) struct Nic {
    pub(crate) rx: VecDeque<Vec<u8>>,
    pub(crate) tx: Vec<Vec<u8>>,
}

pub(crate) struct Rx(Vec<u8>);
pub(crate) struct Tx<'a>(&'a mut Vec<Vec<u8>>);

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
    pub(crate) static TICKS: Cell<u32> = const { Cell::new(0) };
}

pub(crate) fn client_ticks() -> u32 {
    TICKS.get().wrapping_add(0x7fff_0000)
}

pub(crate) fn active_ticks() -> u32 {
    TICKS.get().wrapping_add(0xffff_fff0)
}

/// What a connection's ends may use, and where their numbers start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tweaks {
    pub(crate) timestamps: bool,
    pub(crate) window_scale: bool,
    pub(crate) sack: bool,
    pub(crate) client_isn: Option<u32>,
    pub(crate) active_isn: Option<u32>,
    pub(crate) client_buffer: usize,
    pub(crate) active_buffer: usize,
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

/// After so long with something to be acknowledged, but nothing sent, smoltcp is woken, ns.
const STUCK: Nanos = 3 * SECOND;

/// What the edge of a stack knows of a connection.
#[derive(Default)]
pub(crate) struct Edge {
    /// Window shifts that both have announced.
    own_shift: Option<u8>,
    peer_shift: Option<u8>,
    /// What the own stack has acknowledged, and the right edge of its window.
    taken: Option<u32>,
    offered: Option<u32>,
    /// The peer's latest acknowledgement, as a pure one, with the widest window that came with it.
    heard: Option<(TcpSeqNumber, u16, Vec<u8>)>,
    /// The own FIN.
    fin: Option<Vec<u8>>,
}

/// A stack behind an edge that renumbers: smoltcp's initial sequence numbers cannot be chosen. The edge also makes
/// up for four of its faults as a kernel: it takes a FIN behind bytes that it does not take, because they are beyond
/// its window; it takes none behind bytes that it has; it lets an older acknowledgement take the window back; and where that is closed, or smaller than what
/// is under way, it may wait for good without a timer.
pub(crate) struct Host {
    pub(crate) nic: Nic,
    pub(crate) iface: Interface,
    pub(crate) sockets: SocketSet<'static>,
    pub(crate) wanted: HashMap<u16, u32>,
    pub(crate) shifts: HashMap<u16, u32>,
    pub(crate) sent: HashMap<u16, u32>,
    pub(crate) plain: HashMap<u16, Tweaks>,
    pub(crate) is_client: bool,
    edges: BTreeMap<u16, Edge>,
    /// Connections that sent nothing of what is to be acknowledged, and when each is to be woken.
    stuck: BTreeMap<u16, Nanos>,
}

impl Host {
    pub(crate) fn new(address: Ipv4Addr, seed: u64, now: Nanos, is_client: bool) -> Self {
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
            wanted: HashMap::default(),
            shifts: HashMap::default(),
            sent: HashMap::default(),
            plain: HashMap::default(),
            is_client,
            edges: BTreeMap::new(),
            stuck: BTreeMap::new(),
        }
    }

    pub(crate) fn receive(&mut self, packet: &[u8]) {
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
            self.edges.entry(port).or_default().heed(repr);
        });
        self.nic.rx.push_back(packet);
    }

    /// Repeats the peer's latest acknowledgement until smoltcp retransmits, or probes the window; or its FIN.
    fn unstick(&mut self, port: u16) {
        let Some(edge) = self.edges.get(&port) else {
            return;
        };
        let of_port = |socket: &Socket<'_>| self.port_of(socket) == Some(port);
        let queue = self
            .sockets
            .iter()
            .map(|(_, socket)| as_tcp(socket))
            .find(|socket| of_port(socket) && is_owed(socket))
            .map(Socket::send_queue);
        match (queue, &edge.heard) {
            (Some(0), _) => {
                let fin = edge.fin.as_ref().map(|fin| {
                    rewrite(fin, |repr| {
                        repr.ack_number = edge.taken.map(seq).or(repr.ack_number);
                    })
                });
                self.nic.tx.extend(fin);
            }
            (Some(_), Some((_, _, packet))) => {
                self.nic.rx.extend(std::iter::repeat_n(packet.clone(), 4));
            }
            _ => {}
        }
    }

    /// The client's port.
    fn port_of(&self, socket: &Socket<'_>) -> Option<u16> {
        let end = if self.is_client {
            socket.local_endpoint()
        } else {
            socket.remote_endpoint()
        };
        end.map(|end| end.port)
    }

    pub(crate) fn poll(&mut self, now: Nanos) -> Vec<Vec<u8>> {
        let stuck: Vec<u16> = self
            .stuck
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(port, _)| *port)
            .collect();
        for port in stuck {
            self.stuck.remove(&port);
            self.unstick(port);
        }
        self.iface
            .poll(instant(now), &mut self.nic, &mut self.sockets);
        let sent = std::mem::take(&mut self.nic.tx);
        sent.into_iter()
            .map(|packet| self.renumber(&packet))
            .collect()
    }

    pub(crate) fn renumber(&mut self, packet: &[u8]) -> Vec<u8> {
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
            let edge = self.edges.entry(port).or_default();
            edge.offer(repr);
            if repr.control == TcpControl::Fin {
                edge.fin = Some(packet.to_vec());
            }
            if repr.control == TcpControl::Fin || !repr.payload.is_empty() {
                self.stuck.remove(&port);
            }
            let shift = self.shifts.get(&port).copied().unwrap_or(0);
            let start = (repr.seq_number.0 as u32).wrapping_add(shift);
            repr.seq_number.0 = start as i32;
            // smoltcp rewinds SND.NXT when it retransmits, and two stacks that do so can ignore each
            // other's ACKs for good. Others put the highest number into an ACK (RFC 9293 section 3.10).
            let end = start.wrapping_add(repr.segment_len() as u32);
            let next = self.sent.entry(port).or_insert(end);
            match repr.control {
                TcpControl::Syn => *next = end,
                TcpControl::None if repr.payload.is_empty() => {
                    repr.seq_number.0 = later(*next, start) as i32;
                }
                // It may be a window probe, which is outside the window.
                _ if repr.payload.len() == 1 => {}
                _ => *next = later(*next, end),
            }
        })
    }

    pub(crate) fn poll_at(&mut self, now: Nanos) -> Nanos {
        for (_, socket) in self.sockets.iter() {
            let socket = as_tcp(socket);
            let Some(port) = self.port_of(socket) else {
                continue;
            };
            if is_owed(socket) {
                self.stuck.entry(port).or_insert(now + STUCK);
            } else {
                self.stuck.remove(&port);
            }
        }
        let stuck = self.stuck.values().copied().min().unwrap_or(Nanos::MAX);
        let at = self.iface.poll_at(instant(now), &self.sockets);
        let at = at.map_or(Nanos::MAX, |at| {
            ((at.total_micros().max(0) as u64) * 1000).max(now + 10_000)
        });
        at.min(stuck)
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }
}

fn as_tcp<'a>(socket: &'a smoltcp::socket::Socket<'static>) -> &'a Socket<'static> {
    let smoltcp::socket::Socket::Tcp(socket) = socket;
    socket
}

/// Whether something of this connection is still to be acknowledged.
fn is_owed(socket: &Socket<'_>) -> bool {
    let closes = matches!(
        socket.state(),
        State::FinWait1 | State::Closing | State::LastAck
    );
    closes || (socket.send_queue() > 0 && socket.state() != State::Closed)
}

impl Edge {
    /// The peer says this.
    fn heed(&mut self, repr: &mut TcpRepr<'_>) {
        if repr.control == TcpControl::Syn {
            *self = Self {
                peer_shift: repr.window_scale,
                own_shift: self.own_shift,
                ..Self::default()
            };
            return;
        }
        let end = (repr.seq_number.0 as u32).wrapping_add(repr.payload.len() as u32);
        if repr.control == TcpControl::Fin && self.offered.is_some_and(|edge| before(edge, end)) {
            repr.control = TcpControl::None;
        }
        if repr.control == TcpControl::Fin
            && let Some(taken) = self.taken
            && !before(end, taken)
        {
            let old = distance(repr.seq_number.0 as u32, taken).max(0) as usize;
            repr.payload = &repr.payload[old..];
            repr.seq_number += old;
        }
        let Some(ack) = repr.ack_number.filter(|_| repr.control != TcpControl::Rst) else {
            return;
        };
        if let Some((known, window, _)) = &self.heard {
            if ack < *known {
                return;
            }
            if ack == *known {
                repr.window_len = repr.window_len.max(*window);
            }
        }
        let bare = TcpRepr {
            control: TcpControl::None,
            payload: &[],
            sack_ranges: [None; 3],
            ..*repr
        };
        let (from, to) = if repr.dst_port < repr.src_port {
            (CLIENT, VIP)
        } else {
            (VIP, CLIENT)
        };
        let mut packet = vec![];
        let caps = ChecksumCapabilities::default();
        emit_packet(&mut packet, from, to, &bare, &caps);
        self.heard = Some((ack, repr.window_len, packet));
    }

    /// The own stack says this.
    fn offer(&mut self, repr: &TcpRepr<'_>) {
        let Some(ack) = repr.ack_number else {
            self.own_shift = repr.window_scale;
            return;
        };
        let shift = if repr.control == TcpControl::Syn {
            self.own_shift = repr.window_scale;
            0
        } else {
            self.peer_shift.and(self.own_shift).unwrap_or(0)
        };
        self.taken = Some(ack.0 as u32);
        let edge = (ack.0 as u32).wrapping_add(u32::from(repr.window_len) << shift);
        self.offered = Some(self.offered.map_or(edge, |known| later(known, edge)));
    }
}

/// Changes a TCP header, keeps the rest.
pub(crate) fn rewrite(packet: &[u8], change: impl FnOnce(&mut TcpRepr<'_>)) -> Vec<u8> {
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

pub(crate) fn socket(buffer: usize, ticks: Option<fn() -> u32>) -> Socket<'static> {
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; buffer]),
        SocketBuffer::new(vec![0; buffer]),
    );
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket.set_tsval_generator(ticks);
    socket
}
