//! The device between a shadow's smoltcp stack and its flow: one packet in, any number out, in
//! memory. One device serves all shadows, one after the other.

use std::collections::VecDeque;

use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken,
};
use smoltcp::time::Instant;
use smoltcp::wire::{
    IPV4_HEADER_LEN, IpAddress, IpProtocol, Ipv4Address, Ipv4Packet, Ipv4Repr, TcpControl,
    TcpPacket, TcpRepr,
};

use crate::heartbeat::Nanos;

/// smoltcp's clock, from nanoseconds of CLOCK_MONOTONIC.
pub fn instant(now: Nanos) -> Instant {
    Instant::from_micros((now / 1000) as i64)
}

/// The in-memory device.
#[derive(Debug)]
pub struct Wire {
    mtu: usize,
    /// Never shorter than it was: what is cut off would be cleared when it comes back.
    input: Vec<u8>,
    /// Bytes of the packet in it that was not received yet.
    loaded: Option<usize>,
    output: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
}

impl Wire {
    /// A device for IP packets of up to `mtu` bytes.
    pub fn new(mtu: usize) -> Self {
        Self {
            mtu,
            input: vec![0; mtu],
            loaded: None,
            output: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// Writes the packet that the next `receive` hands in. Checksums stay empty: the segment was
    /// verified when it was parsed.
    pub fn load(&mut self, from: Ipv4Address, to: Ipv4Address, tcp: &TcpRepr<'_>) {
        let len = packet_len(tcp);
        if self.input.len() < len {
            self.input.resize(len, 0);
        }
        emit(&mut self.input[..len], from, to, tcp, &unchecked());
        self.loaded = Some(len);
    }

    /// Takes the oldest packet that the stack sent. Give it back with [`Wire::recycle`].
    pub fn take_output(&mut self) -> Option<Vec<u8>> {
        self.output.pop_front()
    }

    /// Takes back the buffer of a packet that is done with.
    pub fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < 8 {
            self.spare.push(buffer);
        }
    }
}

/// Input is trusted (the parser verified it), output is completed when it is translated.
fn unchecked() -> ChecksumCapabilities {
    let mut caps = ChecksumCapabilities::ignored();
    caps.ipv4 = Checksum::None;
    caps.tcp = Checksum::None;
    caps
}

/// Writes a whole IPv4/TCP packet into `buffer`.
pub fn emit_packet(
    buffer: &mut Vec<u8>,
    from: Ipv4Address,
    to: Ipv4Address,
    tcp: &TcpRepr<'_>,
    caps: &ChecksumCapabilities,
) {
    buffer.resize(packet_len(tcp), 0);
    emit(buffer, from, to, tcp, caps);
}

fn packet_len(tcp: &TcpRepr<'_>) -> usize {
    IPV4_HEADER_LEN + tcp.buffer_len()
}

/// As [`emit_packet`]; `buffer` is as long as the packet.
fn emit(
    buffer: &mut [u8],
    from: Ipv4Address,
    to: Ipv4Address,
    tcp: &TcpRepr<'_>,
    caps: &ChecksumCapabilities,
) {
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut buffer[..]), caps);
    tcp.emit(
        &mut TcpPacket::new_unchecked(&mut buffer[IPV4_HEADER_LEN..]),
        &IpAddress::Ipv4(from),
        &IpAddress::Ipv4(to),
        caps,
    );
}

/// A segment without options and data.
pub fn bare_repr(src_port: u16, dst_port: u16, control: TcpControl) -> TcpRepr<'static> {
    TcpRepr {
        src_port,
        dst_port,
        control,
        seq_number: smoltcp::wire::TcpSeqNumber(0),
        ack_number: None,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    }
}

impl Device for Wire {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Transmit<'_>)> {
        let len = self.loaded.take()?;
        Some((
            Received(&self.input[..len]),
            Transmit {
                output: &mut self.output,
                spare: &mut self.spare,
            },
        ))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Transmit<'_>> {
        Some(Transmit {
            output: &mut self.output,
            spare: &mut self.spare,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = self.mtu;
        caps.checksum = unchecked();
        caps
    }
}

/// The packet handed in.
#[derive(Debug)]
pub struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for a packet to send.
#[derive(Debug)]
pub struct Transmit<'a> {
    output: &'a mut VecDeque<Vec<u8>>,
    spare: &'a mut Vec<Vec<u8>>,
}

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.resize(len, 0);
        let result = f(&mut buffer);
        self.output.push_back(buffer);
        result
    }
}
