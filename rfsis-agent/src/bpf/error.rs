//! What can go wrong with programs and maps, and what to do about it.

use std::error::Error;
use std::io;

use aya::EbpfError;
use aya::programs::ProgramError;
use aya::programs::tc::TcError;
use aya::programs::xdp::XdpError;
use aya::util::KernelVersion;

/// First kernel with all that is used. From 5.18: `bpf_xdp_load_bytes`, `bpf_xdp_get_buff_len` and
/// multi-buffer XDP programs (`include/uapi/linux/bpf.h`), `IFA_PROTO`, by which the VIP is marked as
/// ours (`include/uapi/linux/if_addr.h`). From 5.9: XDP links. From 5.8: ring buffers, CAP_BPF.
/// `cargo xtask test --kernel` runs the tests on Debian's kernels on both sides of it.
const OLDEST_KERNEL: KernelVersion = KernelVersion::new(5, 18, 0);

/// Why a program could not be loaded, attached, asked or removed.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The agent was compiled without the eBPF object.
    #[error(
        "this rfsis-agent was built without its eBPF programs; run `cargo xtask setup` and build again"
    )]
    ObjectMissing,
    /// The kernel said EPERM.
    #[error(
        "{operation}: not permitted; it needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON \
         (capabilities of the file or of the systemd unit)"
    )]
    Privilege {
        /// What was tried.
        operation: String,
    },
    /// The kernel lacks what the programs use.
    #[error(
        "{operation}: kernel {found} lacks what it takes ({detail}); expected Linux 5.18 or later, \
         the first with multi-buffer XDP and bpf_xdp_load_bytes: boot a newer kernel"
    )]
    Kernel {
        /// What was tried.
        operation: String,
        /// The running kernel's version.
        found: String,
        /// What the kernel said.
        detail: String,
    },
    /// The kernel has no hook for filters, or no filters made of programs.
    #[error(
        "{operation}: kernel {found} has no clsact or no BPF filters ({detail}); expected \
         CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF, or the modules sch_ingress and cls_bpf: install \
         the kernel's modules"
    )]
    Filters {
        /// What was tried.
        operation: String,
        /// The running kernel's version.
        found: String,
        /// What the kernel said.
        detail: String,
    },
    /// The verifier refused a program.
    #[error("kernel {kernel} refused program {program}: {log}")]
    Verifier {
        /// The program.
        program: &'static str,
        /// The running kernel's version.
        kernel: String,
        /// The verifier's log.
        log: String,
    },
    /// There is no such interface.
    #[error("interface {name} does not exist; found {}", crate::netif::listed(.existing))]
    InterfaceMissing {
        /// The name looked for.
        name: String,
        /// The names that there are.
        existing: Vec<String>,
    },
    /// Another XDP program holds the interface.
    #[error(
        "{interface}: another XDP program is attached ({detail}); expected none. If it is another \
         rfsis-agent, stop that; if it was left behind, `rfsis-agent cleanup` or \
         `ip link set dev {interface} xdp off` removes it"
    )]
    XdpBusy {
        /// The interface.
        interface: String,
        /// What the kernel said.
        detail: String,
    },
    /// The object holds no such map or program, or it was taken before.
    #[error("eBPF object has no {kind} {name}, or it was taken before")]
    NotFound {
        /// "map" or "program".
        kind: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// Anything else that failed.
    #[error("{operation}: {detail}")]
    Failed {
        /// What was tried.
        operation: String,
        /// What the kernel or the library said.
        detail: String,
    },
}

impl BpfError {
    /// The process's exit code: 1 failed while running, 2 bad config, 3 missing privilege or kernel
    /// feature.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::ObjectMissing
            | Self::Privilege { .. }
            | Self::Kernel { .. }
            | Self::Filters { .. }
            | Self::Verifier { .. } => 3,
            Self::InterfaceMissing { .. } => 2,
            Self::XdpBusy { .. } | Self::NotFound { .. } | Self::Failed { .. } => 1,
        }
    }

    /// Reads the cause out of an error of aya's or of the system's.
    pub(super) fn new(operation: impl Into<String>, error: &(dyn Error + 'static)) -> Self {
        let operation = operation.into();
        match os_error(error) {
            // What privilege is missing was asked before. Before 5.11 maps count against RLIMIT_MEMLOCK,
            // which an agent that has given up its privileges may not raise: EPERM.
            Some(libc::EPERM | libc::EACCES | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)
                if kernel_is_old() =>
            {
                Self::Kernel {
                    operation,
                    found: kernel(),
                    detail: chain(error),
                }
            }
            Some(libc::EPERM | libc::EACCES) => Self::Privilege { operation },
            _ => Self::Failed {
                operation,
                detail: chain(error),
            },
        }
    }

    /// The same for attaching a filter: ENOENT is a qdisc or classifier that the kernel does not have
    /// (net/sched/sch_api.c, cls_api.c).
    pub(super) fn from_filter(operation: String, error: &(dyn Error + 'static)) -> Self {
        match os_error(error) {
            Some(libc::ENOENT) => Self::Filters {
                operation,
                found: kernel(),
                detail: chain(error),
            },
            _ => Self::new(operation, error),
        }
    }

    /// The same for loading: there EACCES is the verifier's way to say no.
    pub(super) fn from_load(program: &'static str, error: &ProgramError) -> Self {
        match error {
            ProgramError::LoadError {
                io_error,
                verifier_log,
            } if io_error.raw_os_error() != Some(libc::EPERM) => {
                // There is no log where the kernel did not get as far as the verifier.
                let log = format!("{io_error}\n{verifier_log}").trim_end().to_owned();
                if kernel_is_old() {
                    Self::Kernel {
                        operation: format!("loading program {program}"),
                        found: kernel(),
                        detail: log,
                    }
                } else {
                    Self::Verifier {
                        program,
                        kernel: kernel(),
                        log,
                    }
                }
            }
            error => Self::new(format!("loading program {program}"), error),
        }
    }
}

/// The number behind an error, if the kernel gave one.
///
/// Errors of aya that are `transparent` hide the `io::Error` that they are made of from `source`:
/// those are opened by name.
pub(super) fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return error.raw_os_error();
    }
    if let Some(error) = error.downcast_ref::<EbpfError>() {
        match error {
            EbpfError::ProgramError(inner) => return os_error(inner),
            EbpfError::MapError(inner) => return os_error(inner),
            _ => {}
        }
    }
    if let Some(error) = error.downcast_ref::<ProgramError>() {
        match error {
            ProgramError::TcError(inner) => return os_error(inner),
            ProgramError::XdpError(XdpError::NetlinkError(inner))
            | ProgramError::NetlinkError(inner) => return inner.raw_os_error(),
            ProgramError::MapError(inner) => return os_error(inner),
            _ => {}
        }
    }
    match error.downcast_ref::<TcError>() {
        Some(TcError::NetlinkError(inner)) => return inner.raw_os_error(),
        Some(TcError::IoError(inner)) => return inner.raw_os_error(),
        _ => {}
    }
    if let Some(rtnetlink::Error::NetlinkError(message)) = error.downcast_ref() {
        return message.code.map(|code| -code.get());
    }
    os_error(error.source()?)
}

/// An error with its causes, outermost first.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

fn kernel_is_old() -> bool {
    KernelVersion::current().is_ok_and(|running| running < OLDEST_KERNEL)
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(
        |_| "of unknown version".to_owned(),
        |text| text.trim().to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eperm_is_a_missing_privilege_however_deep_it_lies() {
        let eperm = || io::Error::from_raw_os_error(libc::EPERM);
        let map = aya::maps::MapError::CreateError {
            name: "FRAMES".into(),
            io_error: eperm(),
        };
        let errors: [Box<dyn Error>; 4] = [
            Box::new(eperm()),
            Box::new(EbpfError::MapError(map)),
            Box::new(TcError::IoError(eperm())),
            Box::new(ProgramError::TcError(TcError::IoError(eperm()))),
        ];
        for error in errors {
            let found = BpfError::new("attaching", error.as_ref());
            assert!(
                matches!(found, BpfError::Privilege { .. }),
                "{error:?} became {found:?}"
            );
            assert_eq!(found.exit_code(), 3);
        }
    }

    #[test]
    fn a_message_tells_all_causes_once() {
        let map = aya::maps::MapError::CreateError {
            name: "FRAMES".into(),
            io_error: io::Error::from_raw_os_error(libc::ENOMEM),
        };
        let found = BpfError::new("loading the eBPF object", &EbpfError::MapError(map)).to_string();
        assert_eq!(
            found.matches("Cannot allocate memory").count(),
            1,
            "{found}"
        );
        assert!(found.contains("FRAMES"), "{found}");
    }
}
