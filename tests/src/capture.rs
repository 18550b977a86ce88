//! What the client's wire saw, and questions to ask of it.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use etherparse::{NetSlice, SlicedPacket, TcpOptionElement, TcpSlice, TransportSlice};

use crate::lab::{Lab, VIP};
use crate::netns::Namespace;
use crate::wire::{SNAP, Wire};

/// EtherType for local experiments (IEEE 802, 88b5): marks the end of a capture.
const MARKER: [u8; 2] = [0x88, 0xb5];

/// Frames of the client's eth0, from when it is started until it is stopped.
///
/// In this process: `tcpdump` writes more slowly than frames come here, lost up to a seventh of them, and nobody noticed.
#[derive(Debug)]
pub struct Capture {
    client: Arc<Namespace>,
    ended: Arc<AtomicBool>,
    reader: Option<JoinHandle<Result<Trace>>>,
}

impl Capture {
    /// Starts it: what is on the wire from now on is heard.
    ///
    /// # Panics
    /// When it cannot.
    pub fn start(lab: &Lab) -> Self {
        let client = Arc::clone(lab.client());
        let wire = Wire::open(&client).unwrap_or_else(|error| panic!("cannot capture: {error:#}"));
        let ended = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let ended = Arc::clone(&ended);
            move || Trace::record(&wire, &ended)
        });
        Self {
            client,
            ended,
            reader: Some(reader),
        }
    }

    /// Ends the capture: everything that was on the wire before this call is in the trace.
    ///
    /// # Panics
    /// When a frame was lost, or the socket failed.
    pub fn stop(mut self) -> Trace {
        self.try_stop()
            .unwrap_or_else(|error| panic!("cannot read the capture: {error:#}"))
    }

    fn try_stop(&mut self) -> Result<Trace> {
        let mut marker = [0xff; 60];
        marker[6..12].copy_from_slice(&crate::Host::Client.mac());
        marker[12..14].copy_from_slice(&MARKER);
        Wire::open(&self.client)?.send(&marker)?;
        let reader = self.reader.take().context("it was stopped")?;
        reader
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

fn is_marker(frame: &CapturedFrame) -> bool {
    frame.bytes.get(12..14) == Some(&MARKER)
}

/// A frame with its time.
#[derive(Clone, Debug)]
pub struct CapturedFrame {
    /// When the client's kernel saw it.
    pub at: SystemTime,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

impl CapturedFrame {
    /// Hardware address of the sender.
    pub fn source_mac(&self) -> Option<[u8; 6]> {
        self.bytes.get(6..12)?.try_into().ok()
    }

    /// Whether it speaks for the VIP: IPv4 from it, or ARP with it as the sender.
    pub fn is_from_vip(&self) -> bool {
        self.arp().is_some_and(|arp| arp.sender == VIP) || self.ipv4_source() == Some(VIP)
    }

    fn ipv4_source(&self) -> Option<Ipv4Addr> {
        match SlicedPacket::from_ethernet(&self.bytes).ok()?.net? {
            NetSlice::Ipv4(ip) => Some(ip.header().source_addr()),
            _ => None,
        }
    }

    /// ICMP type 3 (RFC 792).
    fn is_unreachable_from_vip(&self) -> bool {
        let packet = SlicedPacket::from_ethernet(&self.bytes).ok();
        let transport = packet.and_then(|packet| packet.transport);
        let unreachable =
            matches!(transport, Some(TransportSlice::Icmpv4(icmp)) if icmp.type_u8() == 3);
        unreachable && self.ipv4_source() == Some(VIP)
    }

    /// The ARP packet in it (RFC 826, Ethernet and IPv4).
    pub fn arp(&self) -> Option<Arp> {
        Arp::of(&self.bytes)
    }

    /// The TCP segment in it.
    pub fn tcp(&self) -> Option<Segment> {
        Segment::of(&self.bytes)
    }
}

impl Segment {
    /// The TCP segment in a frame.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let packet = SlicedPacket::from_ethernet(frame).ok()?;
        let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) =
            (packet.net, packet.transport)
        else {
            return None;
        };
        Some(Segment {
            source: (ip.header().source_addr(), tcp.source_port()),
            destination: (ip.header().destination_addr(), tcp.destination_port()),
            seq: tcp.sequence_number(),
            ack: tcp.acknowledgment_number(),
            window: tcp.window_size(),
            syn: tcp.syn(),
            fin: tcp.fin(),
            rst: tcp.rst(),
            sack: sack_blocks(&tcp),
            payload: tcp.payload().to_vec(),
        })
    }
}

/// An ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 request, 2 reply.
    pub operation: u16,
    /// Sender's protocol address.
    pub sender: Ipv4Addr,
    /// Target's protocol address.
    pub target: Ipv4Addr,
}

impl Arp {
    /// The ARP packet in a frame.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let arp = frame.get(14..42)?;
        if frame.get(12..14)? != [0x08, 0x06] || arp.get(..6)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        let address = |at: usize| Ipv4Addr::new(arp[at], arp[at + 1], arp[at + 2], arp[at + 3]);
        Some(Arp {
            operation: u16::from_be_bytes([arp[6], arp[7]]),
            sender: address(14),
            target: address(24),
        })
    }
}

/// A TCP segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Address and port.
    pub source: (Ipv4Addr, u16),
    /// Address and port.
    pub destination: (Ipv4Addr, u16),
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Window as it is in the header, unscaled.
    pub window: u16,
    /// Flag.
    pub syn: bool,
    /// Flag.
    pub fin: bool,
    /// Flag.
    pub rst: bool,
    /// SACK blocks (RFC 2018 section 3): the first sequence number and the one behind the last.
    pub sack: Vec<(u32, u32)>,
    /// Data.
    pub payload: Vec<u8>,
}

impl Segment {
    /// Time, sender's hardware address, flags and numbers.
    fn summary(&self, frame: &CapturedFrame) -> String {
        let since = frame.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mac = frame.source_mac().unwrap_or_default();
        let flags = [(self.syn, 'S'), (self.fin, 'F'), (self.rst, 'R')];
        let flags: String = flags
            .iter()
            .filter(|(set, _)| *set)
            .map(|(_, flag)| flag)
            .collect();
        format!(
            "{:.6} {mac:02x?} {} > {} [{flags}] seq {} ack {} window {} bytes {}",
            since.as_secs_f64() % 60.0,
            self.source.1,
            self.destination.1,
            self.seq,
            self.ack,
            self.window,
            self.payload.len()
        )
    }
}

fn sack_blocks(tcp: &TcpSlice<'_>) -> Vec<(u32, u32)> {
    let blocks = tcp.options_iterator().find_map(|option| match option {
        Ok(TcpOptionElement::SelectiveAcknowledgement(first, rest)) => {
            let rest = rest.into_iter().flatten();
            Some(std::iter::once(first).chain(rest).collect())
        }
        _ => None,
    });
    blocks.unwrap_or_default()
}

/// How far a connection has been closed.
#[derive(Default)]
struct Closing {
    /// The number behind the VIP's FIN.
    end: Option<u32>,
    /// The client has sent its FIN.
    client_closed: bool,
    /// Besides, it has acknowledged the VIP's.
    over: bool,
}

/// A finished capture.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// In the order of the wire.
    pub frames: Vec<CapturedFrame>,
}

impl Trace {
    /// Hears frames up to the marker.
    fn record(wire: &Wire, ended: &AtomicBool) -> Result<Self> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; SNAP];
        while !ended.load(Ordering::Relaxed) {
            let Some(heard) = wire.next(&mut buffer)? else {
                continue;
            };
            let frame = CapturedFrame {
                at: heard.at,
                bytes: heard.frame.to_vec(),
            };
            let is_last = is_marker(&frame);
            frames.push(frame);
            if is_last {
                ensure!(heard.lost == 0, "{} frames were lost", heard.lost);
                return Ok(Self { frames });
            }
        }
        bail!("nobody wants it any more")
    }

    /// The TCP segments that the VIP sent.
    pub fn segments_from_vip(&self) -> impl Iterator<Item = Segment> {
        let segments = self.frames.iter().filter_map(CapturedFrame::tcp);
        segments.filter(|segment| segment.source.0 == VIP)
    }

    /// Frames that speak for the VIP with this hardware address.
    pub fn from_vip_by(&self, mac: [u8; 6]) -> impl Iterator<Item = &CapturedFrame> {
        self.frames
            .iter()
            .filter(move |frame| frame.source_mac() == Some(mac) && frame.is_from_vip())
    }

    /// That the VIP never refused anybody: no TCP reset, and no ICMP "destination unreachable",
    /// which is what a UDP client sees of a dead server.
    ///
    /// A connection that both sides have closed cannot be reset any more, once the client has acknowledged
    /// the VIP's FIN: it has all bytes, and its TIME-WAIT ignores resets. Any kernel answers by one what comes
    /// after that (RFC 9293 section 3.10.7.1): the second acknowledgement of a FIN that was sent twice, or older
    /// ones that a busy machine's bridge has let the last one overtake.
    ///
    /// # Errors
    /// Names the first refusal.
    pub fn no_reset_from_vip(&self) -> Result<()> {
        // By the client's port and the service's.
        let mut closing: HashMap<(u16, u16), Closing> = HashMap::new();
        for segment in self.frames.iter().filter_map(CapturedFrame::tcp) {
            let (from, to) = (segment.source.1, segment.destination.1);
            let from_vip = segment.source.0 == VIP;
            let flow = if from_vip { (to, from) } else { (from, to) };
            let known = closing.entry(flow).or_default();
            if segment.syn {
                *known = Closing::default();
            } else if !from_vip {
                known.client_closed |= segment.fin;
                known.over |= known.client_closed && known.end == Some(segment.ack);
                continue;
            } else if segment.fin {
                let len = segment.payload.len() as u32;
                known.end = Some(segment.seq.wrapping_add(len).wrapping_add(1));
            }
            if segment.rst && from_vip && !known.over {
                let about = self.last_of(flow, 16).join("\n");
                bail!("the VIP sent a reset: {segment:?}; the end of that connection:\n{about}");
            }
        }
        match self
            .frames
            .iter()
            .find(|frame| frame.is_unreachable_from_vip())
        {
            Some(frame) => bail!("the VIP sent an ICMP unreachable: {frame:?}"),
            None => Ok(()),
        }
    }

    /// The last segments between the client's port and the service's, a line each.
    fn last_of(&self, ports: (u16, u16), count: usize) -> Vec<String> {
        let lines = self.frames.iter().filter_map(|frame| {
            let segment = frame.tcp()?;
            let from_vip = segment.source.0 == VIP;
            let (from, to) = (segment.source.1, segment.destination.1);
            let of_it = if from_vip { (to, from) } else { (from, to) };
            (of_it == ports).then(|| segment.summary(frame))
        });
        let lines: Vec<_> = lines.collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }

    /// That no byte of any connection was sent by the VIP with two values.
    ///
    /// # Errors
    /// Names the first byte that changed.
    pub fn no_byte_from_vip_changed(&self) -> Result<()> {
        let mut streams: HashMap<(u16, u16), SentStream> = HashMap::new();
        for segment in self.segments_from_vip().filter(|segment| !segment.rst) {
            let ports = (segment.destination.1, segment.source.1);
            let stream = if segment.syn {
                let fresh = || SentStream {
                    isn: segment.seq,
                    client: segment.ack,
                    bytes: Vec::new(),
                };
                let stream = streams.entry(ports).or_insert_with(fresh);
                if stream.client != segment.ack {
                    // A later connection of the same ports: the client has opened it.
                    *stream = fresh();
                }
                let isn = stream.isn;
                ensure!(
                    isn == segment.seq,
                    "{ports:?}: another SYN-ACK than {isn}: {segment:?}\n{}",
                    self.last_of(ports, 16).join("\n")
                );
                continue;
            } else if let Some(stream) = streams.get_mut(&ports) {
                stream
            } else {
                continue;
            };
            let offset = segment.seq.wrapping_sub(stream.isn.wrapping_add(1)) as usize;
            // A keep-alive lies one before the first byte (RFC 9293 section 3.8.4).
            if offset > u32::MAX as usize / 2 {
                continue;
            }
            let end = offset + segment.payload.len();
            if stream.bytes.len() < end {
                stream.bytes.resize(end, None);
            }
            for (at, &byte) in (offset..).zip(&segment.payload) {
                let first = *stream.bytes[at].get_or_insert(byte);
                ensure!(
                    first == byte,
                    "{ports:?}: the byte at offset {at} was {first:#04x} and is now {byte:#04x}"
                );
            }
        }
        Ok(())
    }

    /// Who spoke for the VIP, one after the other: no hardware address twice in a row. Who has stopped and begins
    /// again is there again, so two that spoke at the same time would be there by turns.
    pub fn voices(&self) -> Vec<[u8; 6]> {
        let from_vip = self.frames.iter().filter(|frame| frame.is_from_vip());
        let mut voices: Vec<_> = from_vip.filter_map(CapturedFrame::source_mac).collect();
        voices.dedup();
        voices
    }

    /// For how long two spoke for the VIP at the same time: from the first frame of `new` to the last of `old`.
    ///
    /// # Errors
    /// When `old` was not the first to speak, or `new` not the last; says who spoke.
    pub fn overlap(&self, old: [u8; 6], new: [u8; 6]) -> Result<Duration> {
        let voices = self.voices();
        ensure!(
            voices.first() == Some(&old) && voices.last() == Some(&new),
            "not from {old:?} to {new:?}: {voices:?}"
        );
        let began = self.from_vip_by(new).next().map(|frame| frame.at);
        let ended = self.from_vip_by(old).last().map(|frame| frame.at);
        let overlap = began
            .zip(ended)
            .map(|(began, ended)| ended.duration_since(began));
        Ok(overlap.and_then(Result::ok).unwrap_or_default())
    }

    /// That after the first frame for the VIP by `survivor` there is none by `dead`.
    ///
    /// # Errors
    /// When the survivor never spoke, or the dead did afterwards; names the frame.
    pub fn dead_host_is_silent(&self, dead: [u8; 6], survivor: [u8; 6]) -> Result<()> {
        let handover = self
            .frames
            .iter()
            .position(|frame| frame.source_mac() == Some(survivor) && frame.is_from_vip())
            .context("the survivor never spoke for the VIP")?;
        let late = self.frames[handover..]
            .iter()
            .find(|frame| frame.source_mac() == Some(dead) && frame.is_from_vip());
        match late {
            Some(frame) => bail!("a frame from the VIP by the dead host: {frame:?}"),
            None => Ok(()),
        }
    }
}

/// What a connection of the VIP has sent.
struct SentStream {
    /// What the SYN-ACK acknowledges: which of the client's connections it is.
    client: u32,
    isn: u32,
    /// By stream offset, as first sent.
    bytes: Vec<Option<u8>>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Host;
    use etherparse::PacketBuilder;

    fn segment(mac: [u8; 6], seq: u32, syn: bool, rst: bool, payload: &[u8]) -> CapturedFrame {
        let builder = PacketBuilder::ethernet2(mac, Host::Client.mac())
            .ipv4(VIP.octets(), Host::Client.address().octets(), 64)
            .tcp(7, 40_000, seq, 1000);
        let builder = if syn { builder.syn() } else { builder };
        let builder = if rst { builder.rst() } else { builder };
        let mut bytes = Vec::new();
        builder.write(&mut bytes, payload).unwrap();
        CapturedFrame {
            at: UNIX_EPOCH,
            bytes,
        }
    }

    fn trace(frames: impl IntoIterator<Item = CapturedFrame>) -> Trace {
        Trace {
            frames: frames.into_iter().collect(),
        }
    }

    #[test]
    fn a_reset_from_the_vip_is_found() {
        let (a, b) = (Host::A.mac(), Host::B.mac());
        let fine = trace([segment(a, 1, false, false, b"x")]);
        fine.no_reset_from_vip().unwrap();
        let reset = trace([segment(b, 1, false, true, b"")]);
        assert!(reset.no_reset_from_vip().is_err());
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2(a, Host::Client.mac())
            .ipv4(VIP.octets(), Host::Client.address().octets(), 64)
            .icmpv4_raw(3, 3, [0; 4])
            .write(&mut bytes, &[0; 28])
            .unwrap();
        let refused = trace([CapturedFrame {
            at: UNIX_EPOCH,
            bytes,
        }]);
        assert!(refused.no_reset_from_vip().is_err());
    }

    #[test]
    fn an_rst_is_none_only_where_both_sides_have_closed_and_the_client_has_all() {
        let (vip, client) = (VIP.octets(), Host::Client.address().octets());
        let of_client = |fin: bool, ack| {
            let builder = PacketBuilder::ethernet2(Host::Client.mac(), Host::A.mac())
                .ipv4(client, vip, 64)
                .tcp(40_000, 7, 500, 1000)
                .ack(ack);
            let mut bytes = Vec::new();
            let builder = if fin { builder.fin() } else { builder };
            builder.write(&mut bytes, b"").unwrap();
            CapturedFrame {
                at: UNIX_EPOCH,
                bytes,
            }
        };
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2(Host::A.mac(), Host::Client.mac())
            .ipv4(vip, client, 64)
            .tcp(7, 40_000, 90, 1000)
            .fin()
            .write(&mut bytes, b"")
            .unwrap();
        let ours = CapturedFrame {
            at: UNIX_EPOCH,
            bytes,
        };
        let then_reset = |frames: &[&CapturedFrame]| {
            let reset = segment(Host::A.mac(), 42, false, true, b"");
            trace(frames.iter().copied().cloned().chain([reset])).no_reset_from_vip()
        };
        let (theirs, acknowledged) = (of_client(true, 90), of_client(false, 91));
        then_reset(&[&theirs, &ours, &acknowledged]).unwrap();
        then_reset(&[&ours, &acknowledged, &of_client(true, 91)]).unwrap();
        assert!(then_reset(&[&theirs, &ours]).is_err());
        assert!(then_reset(&[&theirs, &ours, &of_client(false, 90)]).is_err());
        assert!(then_reset(&[&theirs, &acknowledged]).is_err());
        assert!(then_reset(&[&ours, &acknowledged]).is_err());
        // The next connection of the same ports.
        let syn = segment(Host::A.mac(), 7, true, false, b"");
        assert!(then_reset(&[&theirs, &ours, &acknowledged, &syn]).is_err());
    }

    #[test]
    fn a_retransmission_may_be_cut_differently_but_not_changed() {
        let a = Host::A.mac();
        let start = u32::MAX - 3;
        let sent = |payload: &[u8], offset: u32| {
            segment(a, start.wrapping_add(1 + offset), false, false, payload)
        };
        let syn = segment(a, start, true, false, b"");
        let same = trace([syn.clone(), sent(b"hello world", 0), sent(b"lo wo", 3)]);
        same.no_byte_from_vip_changed().unwrap();
        let changed = trace([syn, sent(b"hello world", 0), sent(b"lo_wo", 3)]);
        let error = changed.no_byte_from_vip_changed().unwrap_err().to_string();
        assert!(error.contains("offset 5"), "{error}");
    }

    #[test]
    fn a_second_syn_ack_to_the_same_syn_is_found_and_one_to_a_later_syn_begins_anew() {
        let syn_ack = |seq: u32, ack: u32| {
            let mut bytes = Vec::new();
            PacketBuilder::ethernet2(Host::A.mac(), Host::Client.mac())
                .ipv4(VIP.octets(), Host::Client.address().octets(), 64)
                .tcp(7, 40_000, seq, 1000)
                .syn()
                .ack(ack)
                .write(&mut bytes, &[])
                .unwrap();
            CapturedFrame {
                at: UNIX_EPOCH,
                bytes,
            }
        };
        let data = |seq, byte| segment(Host::A.mac(), seq, false, false, &[byte]);
        let first = [syn_ack(10, 1), data(11, 7)];
        let then = |frames: [CapturedFrame; 2]| {
            trace(first.iter().cloned().chain(frames)).no_byte_from_vip_changed()
        };
        then([syn_ack(10, 1), data(11, 7)]).unwrap();
        assert!(then([syn_ack(20, 1), data(21, 8)]).is_err());
        then([syn_ack(10, 2), data(11, 8)]).unwrap();
    }

    #[test]
    fn a_dead_host_that_speaks_after_the_survivor_is_found() {
        let (a, b) = (Host::A.mac(), Host::B.mac());
        let [by_a, by_b] = [a, b].map(|mac| segment(mac, 1, false, false, b"x"));
        trace([by_a.clone(), by_b.clone()])
            .dead_host_is_silent(a, b)
            .unwrap();
        let late = trace([by_a.clone(), by_b, by_a.clone()]);
        assert!(late.dead_host_is_silent(a, b).is_err());
        assert!(trace([by_a]).dead_host_is_silent(a, b).is_err());
    }

    #[test]
    fn voices_that_overlap_are_heard_by_turns_and_for_how_long() {
        let (a, b) = (Host::A.mac(), Host::B.mac());
        let [by_a, by_b] = [a, b].map(|mac| segment(mac, 1, false, false, b"x"));
        let handed_over = trace([by_a.clone(), by_a.clone(), by_b.clone(), by_b.clone()]);
        assert_eq!(handed_over.voices(), [a, b]);
        assert_eq!(handed_over.overlap(a, b).unwrap(), Duration::ZERO);
        assert!(handed_over.overlap(b, a).is_err());
        let later = |frame: &CapturedFrame, millis| CapturedFrame {
            at: frame.at + Duration::from_millis(millis),
            bytes: frame.bytes.clone(),
        };
        let late = [
            by_a.clone(),
            later(&by_b, 1),
            later(&by_a, 4),
            later(&by_b, 9),
        ];
        let late = trace(late);
        assert_eq!(late.voices(), [a, b, a, b]);
        assert_eq!(late.overlap(a, b).unwrap(), Duration::from_millis(3));
        assert!(trace([by_a]).overlap(a, b).is_err());
    }

    #[test]
    fn a_capture_holds_what_was_on_the_wire_before_it_was_stopped() {
        let lab = Lab::new();
        let capture = Capture::start(&lab);
        let frame = segment(Host::A.mac(), 42, false, false, b"captured");
        Wire::open(lab.host(Host::A))
            .unwrap()
            .send(&frame.bytes)
            .unwrap();
        // The frame's arrival is the event; the capture's own marker comes after it.
        let trace = capture.stop();
        let found: Vec<Segment> = trace.segments_from_vip().collect();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].seq, &*found[0].payload), (42, &b"captured"[..]));
        assert_eq!(trace.from_vip_by(Host::A.mac()).count(), 1);
    }
}
