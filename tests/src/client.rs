//! Clients: one that types into `nc`, and ones that transfer bytes and check every one of them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::process::{Child, ChildStdin, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use crate::agent::port;
use crate::lab::{Lab, VIP};
use crate::netns::{Namespace, mortal};
use crate::patience::{PATIENCE, slowed, wait_until};

/// Somebody at a terminal with `nc`: types lines, reads lines.
#[derive(Debug)]
pub struct Typist {
    child: Child,
    keyboard: Option<ChildStdin>,
    screen: Receiver<String>,
}

impl Typist {
    /// `nc -N VIP PORT`
    ///
    /// # Panics
    /// When `nc` cannot be started.
    pub fn tcp(lab: &Lab, port: u16) -> Self {
        // -N: end of typing closes the connection's sending side.
        Self::start(lab.client(), &["-N", &VIP.to_string(), &port.to_string()])
    }

    /// `nc -u VIP PORT`
    ///
    /// # Panics
    /// When `nc` cannot be started.
    pub fn udp(lab: &Lab, port: u16) -> Self {
        Self::start(lab.client(), &["-u", &VIP.to_string(), &port.to_string()])
    }

    fn start(namespace: &Namespace, arguments: &[&str]) -> Self {
        let mut command = mortal("nc");
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = match namespace.spawn(command) {
            Ok(child) => child,
            Err(error) => panic!("{error:#}"),
        };
        let keyboard = child.stdin.take();
        let (sender, screen) = channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Self {
            child,
            keyboard,
            screen,
        }
    }

    /// Types a line.
    ///
    /// # Errors
    /// When `nc` has ended.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let keyboard = self.keyboard.as_mut().context("stdin is closed")?;
        // In one piece: nc makes a datagram of what it reads at once, and datagrams may change places.
        keyboard
            .write_all(format!("{line}\n").as_bytes())
            .context("nc has ended")
    }

    /// The next line on the screen within `limit`.
    pub fn read_line(&self, limit: Duration) -> Option<String> {
        self.screen.recv_timeout(limit).ok()
    }

    /// Types a line and waits for its echo.
    ///
    /// # Panics
    /// When something else comes, or nothing.
    #[track_caller]
    pub fn echoes(&mut self, line: &str) {
        if let Err(error) = self.type_line(line) {
            panic!("typing {line:?}: {error:#}");
        }
        assert_eq!(
            self.read_line(slowed(PATIENCE)).as_deref(),
            Some(line),
            "the echo of a typed line"
        );
    }

    /// Types a line again and again, as one does with UDP, until it is echoed.
    ///
    /// # Panics
    /// When it never is.
    #[track_caller]
    pub fn echoes_in_the_end(&mut self, line: &str) {
        let found = wait_until(
            "a datagram to be echoed",
            || {
                // What is typed into an nc that has ended may go unnoticed.
                assert!(self.is_connected(), "nc -u has ended: it was refused");
                self.type_line(line).ok();
                self.read_line(slowed(Duration::from_millis(100)))
            },
            Option::is_some,
        );
        assert_eq!(found.as_deref(), Some(line));
        // Late echoes of the repetitions must not be taken for the next line's.
        while self.read_line(slowed(Duration::from_millis(100))).is_some() {}
    }

    /// Whether `nc` is still there: it ends when its connection does.
    pub fn is_connected(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Ends typing (Ctrl-D) and waits until `nc` has seen the server close too.
    ///
    /// # Panics
    /// When `nc` does not end.
    #[track_caller]
    pub fn hang_up(&mut self) -> ExitStatus {
        drop(self.keyboard.take());
        let child = &mut self.child;
        wait_until(
            "nc to end",
            || child.try_wait().ok().flatten(),
            Option::is_some,
        )
        .unwrap_or_default()
    }
}

impl Drop for Typist {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Connects from the client to the VIP; reads and writes time out after [`PATIENCE`].
///
/// # Errors
/// What `connect` says.
pub fn connect(lab: &Lab, port: u16) -> Result<TcpStream> {
    let stream = lab
        .client()
        .run(|| TcpStream::connect_timeout(&SocketAddr::from((VIP, port)), slowed(PATIENCE)))
        .with_context(|| format!("connecting to {VIP}:{port}"))?;
    patient(stream)
}

/// [`connect`] with a small receive buffer: SO_RCVBUF in bytes.
///
/// # Errors
/// What `connect` says.
pub fn connect_narrow(lab: &Lab, port: u16, receive_buffer: usize) -> Result<TcpStream> {
    let socket = lab.client().run(|| -> Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_recv_buffer_size(receive_buffer)?;
        socket.connect_timeout(&SocketAddr::from((VIP, port)).into(), slowed(PATIENCE))?;
        Ok(socket)
    })?;
    patient(socket.into())
}

/// Begins to connect and does not wait for the answer.
///
/// # Errors
/// When `connect` fails at once.
pub fn begin_connect(lab: &Lab, port: u16) -> Result<Connecting> {
    lab.client().run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        match socket.connect(&SocketAddr::from((VIP, port)).into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error.into()),
            _ => Ok(Connecting(socket)),
        }
    })
}

/// A handshake in flight.
#[derive(Debug)]
pub struct Connecting(Socket);

impl Connecting {
    /// Waits for the end of the handshake.
    ///
    /// # Errors
    /// When it was refused, reset or timed out.
    pub fn finish(self) -> Result<TcpStream> {
        let socket = self.0;
        // Writable, or in error, when the handshake is over.
        let mut ready = [nix::poll::PollFd::new(
            std::os::fd::AsFd::as_fd(&socket),
            nix::poll::PollFlags::POLLOUT,
        )];
        let limit = u16::try_from(slowed(PATIENCE).as_millis()).unwrap_or(u16::MAX);
        ensure!(
            nix::poll::poll(&mut ready, limit)? == 1,
            "handshake timed out"
        );
        if let Some(error) = socket.take_error()? {
            return Err(error).context("handshake");
        }
        socket.set_nonblocking(false)?;
        patient(socket.into())
    }
}

fn patient(stream: TcpStream) -> Result<TcpStream> {
    stream.set_read_timeout(Some(slowed(PATIENCE)))?;
    stream.set_write_timeout(Some(slowed(PATIENCE)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Bytes that look random and can be made again: xorshift64 of a seed.
#[derive(Clone, Debug)]
pub struct Noise(u64);

impl Noise {
    /// Another sequence for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next bytes of the sequence.
    pub fn fill(&mut self, room: &mut [u8]) {
        for chunk in room.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Sends a few bytes, others for each seed.
///
/// # Errors
/// When the connection was reset.
pub fn says(mut stream: &TcpStream, seed: u64) -> Result<()> {
    let mut said = [0; 16];
    Noise::new(seed).fill(&mut said);
    stream.write_all(&said).context("saying something")
}

/// Reads the echo of what [`says`] sent with this seed.
///
/// # Errors
/// When something else comes, or nothing.
pub fn hears(mut stream: &TcpStream, seed: u64) -> Result<()> {
    let (mut heard, mut said) = ([0; 16], [0; 16]);
    Noise::new(seed).fill(&mut said);
    stream
        .read_exact(&mut heard)
        .context("waiting for an echo")?;
    ensure!(heard == said, "heard {heard:?}, said {said:?}");
    Ok(())
}

/// Connections to echo that have said something and heard it.
///
/// # Panics
/// When one does not.
pub fn clients(lab: &Lab, count: u64) -> Vec<TcpStream> {
    let talk = |seed| -> Result<TcpStream> {
        let stream = connect(lab, port::ECHO)?;
        says(&stream, seed)?;
        hears(&stream, seed)?;
        Ok(stream)
    };
    let talking = (0..count).map(|seed| match talk(seed) {
        Ok(stream) => stream,
        Err(error) => panic!("connection {seed}: {error:#}"),
    });
    talking.collect()
}

/// Closes, and expects the server to close too.
///
/// # Errors
/// As [`expect_end`].
pub fn parts(stream: &TcpStream) -> Result<()> {
    stream.shutdown(Shutdown::Write).context("closing")?;
    expect_end(stream)
}

/// Bytes a transfer moves per call; a multiple of 8, so that [`Noise`] is the same however cut.
const CHUNK: usize = 16 * 1024;

/// Sends `total` bytes of noise through an echo service and checks every byte that returns, then
/// closes and checks that the server closes too. `progress` counts the bytes checked.
///
/// # Errors
/// At the first wrong byte, at a reset, or after [`PATIENCE`] without any progress.
pub fn echo_exactly(stream: &TcpStream, total: u64, seed: u64, progress: &AtomicU64) -> Result<()> {
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || -> Result<()> {
            let (mut noise, mut chunk, mut left) = (Noise::new(seed), vec![0; CHUNK], total);
            while left > 0 {
                let count = left.min(CHUNK as u64) as usize;
                noise.fill(&mut chunk[..count]);
                let mut out = stream;
                out.write_all(&chunk[..count])
                    .with_context(|| format!("sending, {left} of {total} bytes left"))?;
                left -= count as u64;
            }
            stream.shutdown(Shutdown::Write).context("closing")
        });
        let mut noise = Noise::new(seed);
        let received = check_stream(stream, total, progress, |_, room| noise.fill(room))
            .and_then(|()| expect_end(stream));
        if received.is_err() {
            // The sender may be stuck in a write: nothing more is to be learnt from it.
            stream.shutdown(Shutdown::Both).ok();
        }
        let sent = sender
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        received.and(sent)
    })
}

/// Reads `total` bytes of chargen and checks each. `progress` counts them; `from` is the stream
/// offset of the first.
///
/// # Errors
/// At the first wrong byte, at a reset or end, or after [`PATIENCE`] without any progress.
pub fn chargen_exactly(
    stream: &TcpStream,
    from: u64,
    total: u64,
    progress: &AtomicU64,
) -> Result<()> {
    check_stream(stream, total, progress, |offset, room| {
        for (byte, position) in room.iter_mut().zip(from + offset..) {
            *byte = chargen_byte(position);
        }
    })
}

/// Reads `total` bytes and checks each: `expect` makes those from an offset on. `progress` counts them.
///
/// # Errors
/// As [`chargen_exactly`].
pub fn check_stream(
    mut stream: &TcpStream,
    total: u64,
    progress: &AtomicU64,
    mut expect: impl FnMut(u64, &mut [u8]),
) -> Result<()> {
    let (mut found, mut expected, mut offset) = (vec![0; CHUNK], vec![0; CHUNK], 0);
    while offset < total {
        let count = (total - offset).min(CHUNK as u64) as usize;
        let (found, expected) = (&mut found[..count], &mut expected[..count]);
        let mut filled = 0;
        while filled < count {
            let read = stream
                .read(&mut found[filled..])
                .with_context(|| format!("reading at offset {}", offset + filled as u64))?;
            ensure!(
                read > 0,
                "end of stream at offset {} of {total}",
                offset + filled as u64
            );
            filled += read;
            progress.fetch_add(read as u64, Ordering::Relaxed);
        }
        expect(offset, expected);
        if let Some(at) = (0..count).find(|&at| found[at] != expected[at]) {
            bail!(
                "wrong byte at offset {}: found {:?}, expected {:?}",
                offset + at as u64,
                &found[at..count.min(at + 16)],
                &expected[at..count.min(at + 16)]
            );
        }
        offset += count as u64;
    }
    Ok(())
}

/// Expects the server to have closed, properly.
///
/// # Errors
/// When more bytes come, or a reset.
pub fn expect_end(mut stream: &TcpStream) -> Result<()> {
    let mut byte = [0];
    match stream
        .read(&mut byte)
        .context("waiting for the server's FIN")?
    {
        0 => Ok(()),
        _ => bail!("byte {} beyond the end", byte[0]),
    }
}

/// RFC 864 section 3, written anew: 72 of 95 printable characters a line, rotated by one a line.
pub fn chargen_byte(position: u64) -> u8 {
    let (line, column) = (position / 74, position % 74);
    match column {
        72 => b'\r',
        73 => b'\n',
        _ => b' ' + ((line + column) % 95) as u8,
    }
}

/// State of a TCP socket, as the kernel numbers it (include/net/tcp_states.h).
pub mod tcp_state {
    /// The other side has closed, this one has not.
    pub const CLOSE_WAIT: u8 = 8;
    /// Both have closed, the last FIN is not acknowledged.
    pub const LAST_ACK: u8 = 9;
    /// This side has closed, and that is not acknowledged.
    pub const FIN_WAIT1: u8 = 4;
}

/// Local port and state of every TCP socket of the namespace that talks to `peer`.
///
/// # Panics
/// When the kernel's table cannot be read.
pub fn tcp_sockets(namespace: &Namespace, peer: Ipv4Addr) -> Vec<(u16, u8)> {
    let sockets = tcp_table(namespace, peer).into_iter();
    sockets.map(|(port, state, _)| (port, state)).collect()
}

/// Bytes that were written to this socket, which talks to `peer`, and are not acknowledged; `None` without such a socket.
///
/// # Panics
/// As [`tcp_sockets`].
pub fn unacknowledged(namespace: &Namespace, peer: Ipv4Addr, stream: &TcpStream) -> Option<u64> {
    let port = stream.local_addr().ok()?.port();
    let mut sockets = tcp_table(namespace, peer).into_iter();
    sockets.find_map(|(local, _, bytes)| (local == port).then_some(bytes))
}

/// Local port, state, and bytes to be acknowledged (proc_net_tcp.rst of the kernel's documentation).
fn tcp_table(namespace: &Namespace, peer: Ipv4Addr) -> Vec<(u16, u8, u64)> {
    let table = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp"));
    let table = table.unwrap_or_else(|error| panic!("/proc/net/tcp: {error}"));
    let peer = format!("{:08X}", u32::from_ne_bytes(peer.octets()));
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (_, local_port) = fields.get(1)?.split_once(':')?;
            let (remote, _) = fields.get(2)?.split_once(':')?;
            let state = u8::from_str_radix(fields.get(3)?, 16).ok()?;
            let (unacknowledged, _) = fields.get(4)?.split_once(':')?;
            let unacknowledged = u64::from_str_radix(unacknowledged, 16).ok()?;
            let port = u16::from_str_radix(local_port, 16).ok()?;
            (remote == peer).then_some((port, state, unacknowledged))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Serves one connection on the loopback and returns the client's end.
    fn served(serve: impl FnOnce(TcpStream) + Send + 'static) -> TcpStream {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(listener.accept().unwrap().0));
        TcpStream::connect(address).unwrap()
    }

    fn echo(mut stream: TcpStream, spoil: Option<usize>) {
        let (mut buffer, mut seen) = (vec![0; 1000], 0);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if let Some(at) = spoil
                && (seen..seen + count).contains(&at)
            {
                buffer[at - seen] ^= 1;
            }
            seen += count;
            stream.write_all(&buffer[..count]).unwrap();
        }
    }

    #[test]
    fn a_faithful_echo_passes() {
        let progress = AtomicU64::new(0);
        let stream = served(|stream| echo(stream, None));
        echo_exactly(&stream, 300_000, 7, &progress).unwrap();
        assert_eq!(progress.load(Ordering::Relaxed), 300_000);
    }

    #[test]
    fn one_flipped_bit_in_an_echo_is_found_where_it_is() {
        let stream = served(|stream| echo(stream, Some(123_456)));
        let error = echo_exactly(&stream, 300_000, 7, &AtomicU64::new(0)).unwrap_err();
        assert!(error.to_string().contains("offset 123456"), "{error:#}");
    }

    #[test]
    fn chargen_is_checked_against_the_pattern() {
        let stream = served(|mut stream| {
            let text: Vec<u8> = (0..1000).map(chargen_byte).collect();
            stream.write_all(&text).unwrap();
        });
        chargen_exactly(&stream, 0, 500, &AtomicU64::new(0)).unwrap();
        chargen_exactly(&stream, 500, 400, &AtomicU64::new(0)).unwrap();
        assert!(chargen_exactly(&stream, 0, 100, &AtomicU64::new(0)).is_err());
    }

    #[test]
    fn nc_types_and_reads_and_hangs_up() {
        let lab = Lab::new();
        let node = lab.host(crate::Host::A);
        node.sh(&format!("ip addr add {VIP}/24 dev eth0")).unwrap();
        let listener = node.run(|| TcpListener::bind((VIP, 7))).unwrap();
        std::thread::spawn(move || echo(listener.accept().unwrap().0, None));
        let mut typist = Typist::tcp(&lab, 7);
        typist.echoes("hello");
        typist.echoes("world");
        assert!(typist.is_connected());
        assert_eq!(tcp_sockets(lab.client(), VIP).len(), 1);
        assert!(typist.hang_up().success());
    }
}
