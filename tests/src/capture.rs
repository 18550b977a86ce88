//! What the client's wire saw: `tcpdump` to a file, and questions to ask of it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use etherparse::{NetSlice, SlicedPacket, TcpOptionElement, TcpSlice, TransportSlice};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Lab, VIP};
use crate::netns::{Namespace, mortal};
use crate::patience::wait_until;
use crate::wire::Wire;

/// EtherType for local experiments (IEEE 802, 88b5): marks the end of a capture.
const MARKER: [u8; 2] = [0x88, 0xb5];

/// A running `tcpdump` on the client's eth0.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    file: PathBuf,
    client: Arc<Namespace>,
}

impl Capture {
    /// Starts it and waits until it listens.
    ///
    /// # Panics
    /// When it cannot.
    pub fn start(lab: &Lab) -> Self {
        Self::try_start(lab).unwrap_or_else(|error| panic!("cannot capture: {error:#}"))
    }

    fn try_start(lab: &Lab) -> Result<Self> {
        let file = lab.directory().join("client.pcap");
        let mut command = mortal("tcpdump");
        command
            .args(["-i", "eth0", "-n", "-U", "--immediate-mode", "-Z", "root"])
            .args(["-s", "0", "-B", "65536", "-w"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let client = Arc::clone(lab.client());
        let mut child = client.spawn(command)?;
        let stderr = child.stderr.take().context("no stderr of tcpdump")?;
        let mut said = String::new();
        let mut lines = BufReader::new(stderr);
        while !said.contains("listening on") {
            ensure!(lines.read_line(&mut said)? > 0, "tcpdump ended: {said}");
        }
        // Read on, so that tcpdump never blocks on a full pipe.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        Ok(Self {
            child,
            file,
            client,
        })
    }

    /// Ends the capture: everything that was on the wire before this call is in the trace.
    ///
    /// # Panics
    /// When the trace cannot be read.
    pub fn stop(mut self) -> Trace {
        self.try_stop()
            .unwrap_or_else(|error| panic!("cannot read the capture: {error:#}"))
    }

    fn try_stop(&mut self) -> Result<Trace> {
        let mut marker = [0xff; 60];
        marker[6..12].copy_from_slice(&crate::Host::Client.mac());
        marker[12..14].copy_from_slice(&MARKER);
        Wire::open(&self.client)?.send(&marker)?;
        let trace = wait_until(
            "the marker frame in the capture",
            || Trace::read(&self.file).ok(),
            |trace| {
                trace
                    .as_ref()
                    .is_some_and(|trace| trace.frames.iter().any(is_marker))
            },
        );
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)?;
        self.child.wait()?;
        trace.context("no trace")
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
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
        let arp = self.bytes.get(14..42)?;
        if self.bytes.get(12..14)? != [0x08, 0x06] || arp.get(..6)? != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        let address = |at: usize| Ipv4Addr::new(arp[at], arp[at + 1], arp[at + 2], arp[at + 3]);
        Some(Arp {
            operation: u16::from_be_bytes([arp[6], arp[7]]),
            sender: address(14),
            target: address(24),
        })
    }

    /// The TCP segment in it.
    pub fn tcp(&self) -> Option<Segment> {
        let packet = SlicedPacket::from_ethernet(&self.bytes).ok()?;
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

/// A finished capture.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// In the order of the wire.
    pub frames: Vec<CapturedFrame>,
}

impl Trace {
    /// Reads a pcap file of this machine's byte order, up to its last whole frame.
    fn read(path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        let word = |at: usize| -> Option<u32> {
            Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        // draft-ietf-opsawg-pcap: 24 bytes of file header, 16 per frame, times in microseconds.
        ensure!(
            word(0) == Some(0xa1b2_c3d4),
            "{} is no pcap file",
            path.display()
        );
        let (mut frames, mut at) = (Vec::new(), 24);
        while let (Some(seconds), Some(micros), Some(length)) =
            (word(at), word(at + 4), word(at + 8))
        {
            let start = at + 16;
            let Some(frame) = bytes.get(start..start + length as usize) else {
                break;
            };
            let since = Duration::new(seconds.into(), micros * 1000);
            frames.push(CapturedFrame {
                at: UNIX_EPOCH + since,
                bytes: frame.to_vec(),
            });
            at = start + length as usize;
        }
        Ok(Self { frames })
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
    /// A connection that both sides have closed cannot be reset any more: when its last FIN was sent
    /// twice, the client acknowledges it twice, and any kernel answers the second with an RST at that
    /// number (RFC 9293 section 3.10.7.1), which the client's TIME-WAIT ignores.
    ///
    /// # Errors
    /// Names the first refusal.
    pub fn no_reset_from_vip(&self) -> Result<()> {
        // By the client's port and the service's: the end of the VIP's FIN, and whether the client
        // has sent its own.
        let mut closing: HashMap<(u16, u16), (Option<u32>, bool)> = HashMap::new();
        for segment in self.frames.iter().filter_map(CapturedFrame::tcp) {
            let (from, to) = (segment.source.1, segment.destination.1);
            if segment.source.0 != VIP {
                let (_, client_closed) = closing.entry((from, to)).or_default();
                *client_closed = (*client_closed || segment.fin) && !segment.syn;
                continue;
            }
            let (end, client_closed) = closing.entry((to, from)).or_default();
            if segment.syn {
                *end = None;
            } else if segment.fin {
                let len = segment.payload.len() as u32;
                *end = Some(segment.seq.wrapping_add(len).wrapping_add(1));
            }
            if segment.rst && !(*client_closed && *end == Some(segment.seq)) {
                bail!("the VIP sent a reset: {segment:?}");
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

    /// That no byte of any connection was sent by the VIP with two values.
    ///
    /// # Errors
    /// Names the first byte that changed.
    pub fn no_byte_from_vip_changed(&self) -> Result<()> {
        let mut streams: HashMap<(u16, u16), SentStream> = HashMap::new();
        for segment in self.segments_from_vip().filter(|segment| !segment.rst) {
            let ports = (segment.destination.1, segment.source.1);
            let stream = if segment.syn {
                let stream = streams.entry(ports).or_insert_with(|| SentStream {
                    isn: segment.seq,
                    bytes: Vec::new(),
                });
                let isn = stream.isn;
                ensure!(
                    isn == segment.seq,
                    "{ports:?}: another SYN-ACK than {isn}: {segment:?}"
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
    fn an_rst_is_none_only_where_both_sides_have_closed_and_at_that_number() {
        let fin = |from: Host, (source, to): ([u8; 4], [u8; 4]), (port, peer), seq| {
            let mut bytes = Vec::new();
            PacketBuilder::ethernet2(from.mac(), Host::A.mac())
                .ipv4(source, to, 64)
                .tcp(port, peer, seq, 1000)
                .fin()
                .write(&mut bytes, b"")
                .unwrap();
            CapturedFrame {
                at: UNIX_EPOCH,
                bytes,
            }
        };
        let (vip, client) = (VIP.octets(), Host::Client.address().octets());
        let theirs = fin(Host::Client, (client, vip), (40_000, 7), 500);
        let ours = fin(Host::A, (vip, client), (7, 40_000), 90);
        let rst = |seq| segment(Host::A.mac(), seq, false, true, b"");
        let closed = [theirs.clone(), ours.clone()];
        let with = |frames: &[CapturedFrame], last| {
            trace(frames.iter().cloned().chain([last])).no_reset_from_vip()
        };
        with(&closed, rst(91)).unwrap();
        assert!(with(&closed, rst(90)).is_err());
        assert!(with(&[theirs], rst(91)).is_err());
        assert!(with(&[ours], rst(91)).is_err());
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
    fn voices_that_overlap_are_heard_by_turns() {
        let (a, b) = (Host::A.mac(), Host::B.mac());
        let [by_a, by_b] = [a, b].map(|mac| segment(mac, 1, false, false, b"x"));
        let handed_over = trace([by_a.clone(), by_a.clone(), by_b.clone(), by_b.clone()]);
        assert_eq!(handed_over.voices(), [a, b]);
        let late = trace([by_a.clone(), by_b.clone(), by_a, by_b]);
        assert_eq!(late.voices(), [a, b, a, b]);
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
