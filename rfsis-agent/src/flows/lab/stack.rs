//! A host: smoltcp behind an edge that renumbers.

use super::*;

#[derive(Default)]
pub(super) struct Nic {
    pub(super) rx: VecDeque<Vec<u8>>,
    pub(super) tx: Vec<Vec<u8>>,
}

pub(super) struct Rx(Vec<u8>);
pub(super) struct Tx<'a>(&'a mut Vec<Vec<u8>>);

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
    pub(super) static TICKS: Cell<u32> = const { Cell::new(0) };
}

pub(super) fn client_ticks() -> u32 {
    TICKS.get().wrapping_add(0x7fff_0000)
}

pub(super) fn active_ticks() -> u32 {
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
pub(super) struct Host {
    pub(super) nic: Nic,
    pub(super) iface: Interface,
    pub(super) sockets: SocketSet<'static>,
    pub(super) wanted: HashMap<u16, u32>,
    pub(super) shifts: HashMap<u16, u32>,
    pub(super) sent: HashMap<u16, u32>,
    pub(super) plain: HashMap<u16, Tweaks>,
    pub(super) is_client: bool,
}

impl Host {
    pub(super) fn new(address: Ipv4Addr, seed: u64, now: Nanos, is_client: bool) -> Self {
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
            sent: HashMap::new(),
            plain: HashMap::new(),
            is_client,
        }
    }

    pub(super) fn receive(&mut self, packet: &[u8]) {
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

    pub(super) fn poll(&mut self, now: Nanos) -> Vec<Vec<u8>> {
        self.iface
            .poll(instant(now), &mut self.nic, &mut self.sockets);
        let sent = std::mem::take(&mut self.nic.tx);
        sent.into_iter()
            .map(|packet| self.renumber(&packet))
            .collect()
    }

    pub(super) fn renumber(&mut self, packet: &[u8]) -> Vec<u8> {
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

    pub(super) fn poll_at(&mut self, now: Nanos) -> Nanos {
        match self.iface.poll_at(instant(now), &self.sockets) {
            Some(at) => ((at.total_micros().max(0) as u64) * 1000).max(now + 10_000),
            None => Nanos::MAX,
        }
    }

    pub(super) fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
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

pub(super) fn socket(buffer: usize, ticks: Option<fn() -> u32>) -> Socket<'static> {
    let mut socket = Socket::new(
        SocketBuffer::new(vec![0; buffer]),
        SocketBuffer::new(vec![0; buffer]),
    );
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    socket.set_tsval_generator(ticks);
    socket
}
