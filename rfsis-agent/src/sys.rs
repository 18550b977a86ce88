//! System calls that no crate wraps safely.

use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::heartbeat::Nanos;

/// CLOCK_MONOTONIC, ns: the clock of `bpf_ktime_get_ns`.
pub fn monotonic() -> Nanos {
    // CLOCK_MONOTONIC exists on every Linux; the call can only fail for an unknown clock.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
        .unwrap_or(0)
}

/// Sends UDP without checksums (`SO_NO_CHECK`), for what proves itself better. Errors: of setsockopt(2).
pub fn omit_checksums(socket: &std::net::UdpSocket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the pointer and the length describe `on`, which outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NO_CHECK,
            (&raw const on).cast(),
            size_of_val(&on) as u32,
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Words that programs in the kernel and this process exchange: the memory of an array map.
#[derive(Debug)]
pub struct SharedWords {
    words: NonNull<AtomicU64>,
    len: NonZeroUsize,
}

// SAFETY: all that it gives out are atomic words, which live as long as it.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// The first `len` values, of 8 bytes each, of an array that was made with `BPF_F_MMAPABLE`.
    ///
    /// Errors: of mmap(2); EINVAL where the array was made otherwise, or has fewer (`array_map_mmap`,
    /// kernel/bpf/arraymap.c).
    pub fn map(array: impl AsFd, len: NonZeroUsize) -> nix::Result<Self> {
        let bytes = len.get().checked_mul(size_of::<AtomicU64>());
        let bytes = bytes
            .and_then(NonZeroUsize::new)
            .ok_or(nix::Error::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, which nothing else refers to; the memory is the kernel's, and is not cut short.
        let start = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, array, 0) }?;
        Ok(Self {
            words: start.cast(),
            len,
        })
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped until `drop`, at the start of a page; the kernel's programs change them as
        // wholes, too.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len.get()) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: what `map` has mapped, and nobody refers to any more. Cannot fail for that.
        let _ = unsafe { munmap(self.words.cast(), self.len.get() * size_of::<AtomicU64>()) };
    }
}

/// How far [`monotonic`] is off the machine's clock, seconds: the process is in a time namespace
/// (time_namespaces(7)), and the programs in the kernel are not. 0 where the kernel has none.
pub fn monotonic_offset() -> i64 {
    let offsets = std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
    let of_monotonic = offsets
        .lines()
        .find_map(|line| line.strip_prefix("monotonic"));
    let seconds = of_monotonic.and_then(|rest| rest.split_whitespace().next());
    seconds
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(0)
}

/// Sends Ethernet frames on one interface, and keeps it promiscuous while open: on a hub the
/// standby must see frames that are addressed to the active.
///
/// Frames go through the egress qdisc, and so through the gate.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens a send-only socket (protocol 0 receives nothing, packet(7)).
    ///
    /// Errors are those of socket(2), bind(2) and setsockopt(2); EPERM without CAP_NET_RAW.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: an all-zero sockaddr_ll is valid.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = ifindex as i32;
        // SAFETY: the pointer and the length describe `address`, which outlives the call.
        let bound = unsafe {
            libc::bind(
                fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        let request = libc::packet_mreq {
            mr_ifindex: ifindex as i32,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        // SAFETY: the pointer and the length describe `request`, which outlives the call.
        let joined = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_ADD_MEMBERSHIP,
                (&raw const request).cast(),
                size_of::<libc::packet_mreq>() as u32,
            )
        };
        if joined < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(fd))
    }

    /// Sends one frame, from its Ethernet header on; never blocks.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the pointer and the length describe `frame`, which outlives the call.
        let sent = unsafe {
            libc::send(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                libc::MSG_DONTWAIT,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Sends whole IPv4 packets out of one interface: the kernel routes them and finds the next hop,
/// and the gate applies to them as to everyone.
#[derive(Debug)]
pub struct RawIpSocket(Socket);

impl RawIpSocket {
    /// Opens the socket, bound to `interface`. Errors: EPERM without CAP_NET_RAW.
    pub fn open(interface: &str) -> io::Result<Self> {
        // IPPROTO_RAW implies IP_HDRINCL (raw(7)).
        let socket = Socket::new(
            Domain::IPV4,
            Type::RAW,
            Some(Protocol::from(libc::IPPROTO_RAW)),
        )?;
        socket.bind_device(Some(interface.as_bytes()))?;
        socket.set_nonblocking(true)?;
        // A takeover sends for every flow at once.
        socket.set_send_buffer_size(4 << 20)?;
        Ok(Self(socket))
    }

    /// Marks what is sent (`SO_MARK`, socket(7)). Errors: EPERM without CAP_NET_ADMIN.
    pub fn mark(&self, mark: u32) -> io::Result<()> {
        self.0.set_mark(mark)
    }

    /// Sends one packet to the address in its own header (bytes 16..20); never blocks.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        let Some(destination) = packet.get(16..).and_then(|rest| rest.first_chunk::<4>()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let to = SockAddr::from(SocketAddrV4::new(Ipv4Addr::from(*destination), 0));
        self.0.send_to(packet, &to).map(drop)
    }
}

/// `struct tcp_repair_window` (linux/tcp.h): windows as the kernel keeps them, bytes.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct RepairWindow {
    /// Sequence number of the segment that last changed the peer's window.
    pub snd_wl1: u32,
    /// The peer's window, from what it has acknowledged on.
    pub snd_wnd: u32,
    /// The largest that it ever was.
    pub max_window: u32,
    /// The window that was offered to the peer, from `rcv_wup` on.
    pub rcv_wnd: u32,
    /// What was acknowledged to the peer when it was offered.
    pub rcv_wup: u32,
}

/// Types of which any bytes are a value, without padding that matters.
trait Plain: Copy {}
impl Plain for u32 {}
impl Plain for RepairWindow {}
impl Plain for libc::tcp_info {}

fn get_tcp_option<T: Plain>(socket: BorrowedFd<'_>, name: i32) -> io::Result<T> {
    // SAFETY: all types that are `Plain` consist of integers, for which zero is valid.
    let mut value: T = unsafe { zeroed() };
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointers are to `value` and its length, which outlive the call; the kernel writes
    // no more bytes than that, and any bytes make a valid `T`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// Reads an option of level IPPROTO_TCP that is one number. Errors are those of getsockopt(2).
pub fn tcp_option(socket: BorrowedFd<'_>, name: i32) -> io::Result<u32> {
    get_tcp_option(socket, name)
}

/// TCP_INFO of tcp(7). Errors are those of getsockopt(2).
pub fn tcp_info(socket: BorrowedFd<'_>) -> io::Result<libc::tcp_info> {
    get_tcp_option(socket, libc::TCP_INFO)
}

/// TCP_REPAIR_WINDOW, of a socket in repair mode. Errors are those of getsockopt(2).
pub fn tcp_repair_window(socket: BorrowedFd<'_>) -> io::Result<RepairWindow> {
    get_tcp_option(socket, libc::TCP_REPAIR_WINDOW)
}

/// Sets an option of level IPPROTO_TCP that is made of 32-bit words. Errors are those of setsockopt(2); EPERM
/// without CAP_NET_ADMIN where that is needed.
pub fn set_tcp_option(socket: BorrowedFd<'_>, name: i32, words: &[u32]) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `words`, which the kernel only reads, during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            name,
            words.as_ptr().cast(),
            size_of_val(words) as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Deletes keys of a hash map of the kernel's in one call; one that it has not is passed over. `K` is as long as the
/// map's keys.
///
/// Errors: of bpf(2), `BPF_MAP_DELETE_BATCH` (`generic_map_delete_batch`, kernel/bpf/syscall.c).
pub fn delete_batch<K: aya::Pod>(map: BorrowedFd<'_>, mut keys: &[K]) -> io::Result<()> {
    /// `BPF_MAP_DELETE_BATCH`, and its part of `union bpf_attr`: include/uapi/linux/bpf.h.
    const DELETE_BATCH: libc::c_int = 27;
    #[repr(C)]
    struct Batch {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: u32,
        elem_flags: u64,
        flags: u64,
    }
    while !keys.is_empty() {
        let mut batch = Batch {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: 0,
            count: keys.len() as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads `count` keys, and writes to nothing but `batch`, both of which outlive the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                DELETE_BATCH,
                &raw mut batch,
                size_of::<Batch>(),
            )
        };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::NotFound {
            return Err(error);
        }
        let missing = batch.count as usize;
        keys = keys.get(missing + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Gives the calling thread real-time priority `priority` (1–99, sched(7)).
pub fn real_time(priority: i32) -> io::Result<()> {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the pointer is to a live sched_param; 0 names the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Sets the nice value of the calling thread (Linux: a nice value belongs to a thread).
pub fn nice(value: i32) -> io::Result<()> {
    // SAFETY: no pointers are passed; 0 names the calling thread.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Keeps every page that is touched in memory (mlockall(2), MCL_ONFAULT): a page fault must not
/// delay a heartbeat, and reserved but untouched buffers must not cost memory.
///
/// Needs CAP_IPC_LOCK for good, or no limit of locked memory: past that every later allocation fails.
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: no pointers are passed.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes buffers of a shadow (64 KiB) mappings of their own: untouched pages then cost nothing, and
/// a closed flow gives all of its pages back. Without this, glibc takes them from the top of its
/// heap or reuses freed blocks, and clears them, which touches every page: 41 KiB instead of 9 for
/// each idle flow.
pub fn map_large_buffers() {
    // SAFETY: no pointers are passed. mallopt(3) is called before other threads start.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 48 * 1024);
        libc::mallopt(libc::M_TOP_PAD, 16 * 1024);
        // Two mappings a flow; the kernel merges neighbours.
        libc::mallopt(libc::M_MMAP_MAX, i32::MAX);
    }
}

/// Raises the limit of open files to what is allowed; a connection of a service takes one.
pub fn raise_open_files() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

/// Makes the table of open files large enough for so many at once, or for as many as are allowed: 8 bytes each.
///
/// Where it is full the kernel doubles it, and who opens a file waits for an RCU grace period meanwhile
/// (`expand_fdtable`, fs/file.c): clients would wait for 20 ms, and that at the moment of a takeover.
pub fn reserve_open_files(count: u64) -> nix::Result<()> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let last = count.min(soft).saturating_sub(1).min(i32::MAX as u64);
    let any = EventFd::new()?;
    let high = fcntl(&any, FcntlArg::F_DUPFD_CLOEXEC(last as i32))?;
    // SAFETY: nobody else has this number: it was just given out.
    drop(unsafe { OwnedFd::from_raw_fd(high) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_open_files_has_room_from_the_start() {
        let room = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
            line.unwrap().trim().parse::<u64>().unwrap()
        };
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let most = soft.min(3 * room());
        reserve_open_files(most).unwrap();
        assert!(room() >= most, "{} for {most}", room());
        if soft < 1 << 20 {
            reserve_open_files(u64::MAX).unwrap();
            assert!(room() >= soft, "{} for {soft}", room());
        }
    }
}
