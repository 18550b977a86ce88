//! Tests on one of Debian's kernels instead of the host's, in a virtual machine.
//!
//! The machine is qemu with the package's kernel and a root of its own in memory: busybox, the
//! host's programs with their libraries, the agent and the test binaries. It sees no disk and no
//! network of the host's, and no kernel is installed on it. `/init` runs the tests, whose
//! output comes over one serial line, and the result over another, where no message of the kernel
//! can garble it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::run::{agent, build};
use crate::setup::{PROGRAMS, install_missing};
use crate::shell::{ask, cargo, command, describe, find, run_quietly, workspace};

/// What the host needs, beyond what every test does.
const TOOLS: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("dpkg", "dpkg"),
    ("xz", "xz-utils"),
];

/// Kernel series and the Debian release whose kernel it is.
const RELEASES: [(&str, &str); 3] = [
    ("5.10", "bullseye"),
    ("6.1", "bookworm"),
    ("6.12", "trixie"),
];

/// The oldest kernel with all that the programs use, as `rfsis_agent::bpf` says to the operator.
const OLDEST: [u64; 2] = [5, 18];

/// Seconds after which the machine is taken to hang.
const LIMIT: &str = "1800";

/// An emulated processor is about ten times slower than a real one.
const SLOWNESS: &str = "10";

/// Test binaries and what each is asked to run.
type Plan = Vec<(&'static str, Vec<String>)>;

/// Runs tests of the `tests` package on the newest kernel of a series that Debian has: by default
/// what depends on the kernel most, the programs' tests, and end to end a netcat session across a kill
/// and an adoption; with a filter all tests whose name contains it. On a kernel that is too old, the test
/// that the agent says so.
///
/// # Errors
/// When a test fails, the machine hangs or ends without a result, or something cannot be set up.
pub fn test(series: &str, filter: Option<&str>) -> Result<()> {
    build()?;
    install_missing(&TOOLS, "programs for the virtual machine")?;
    let binaries = test_binaries()?;
    let kernel = Kernel::fetch(series)?;
    let plan = match filter {
        Some(filter) => binaries
            .iter()
            .map(|(name, _)| (name.as_str(), vec![filter.to_owned()]))
            .collect(),
        None => standard_plan(kernel.is_too_old()),
    };
    let mut steps = Vec::new();
    for (name, arguments) in plan {
        let path = binaries.iter().find(|(known, _)| known == name);
        let (_, path) = path.with_context(|| format!("no test binary {name} was built"))?;
        // A filter that fits nothing passes in libtest; here it must not.
        let listed = ask(command(&path.display().to_string())
            .args(&arguments)
            .arg("--list"));
        if listed.is_some_and(|list| list.contains(": test")) {
            steps.push((name, path, arguments));
        } else if filter.is_none() {
            bail!("{name} has no test {arguments:?}");
        }
    }
    ensure!(!steps.is_empty(), "no test has {filter:?} in its name");

    let root = Root::new(kernel.directory.join("root"))?;
    root.add_programs()?;
    root.add_modules(&kernel)?;
    root.add_program("rfsis-agent", &agent())?;
    let mut script = String::new();
    for (name, path, arguments) in steps {
        root.add_program(&format!("test-{name}"), path)?;
        script += &format!(
            "test-{name} {} --test-threads=1 || result=failed\n",
            arguments.join(" ")
        );
    }
    root.add_init(&script)?;
    kernel.boot(&root.pack()?)
}

fn standard_plan(too_old: bool) -> Plan {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect();
    if too_old {
        let test = "--show-output --ignored --exact a_kernel_that_is_too_old_is_named_with_the_one_it_takes";
        return vec![("e2e_refusals", words(test))];
    }
    vec![
        // First: it needs modules that are not loaded yet.
        (
            "e2e_refusals",
            words("--ignored --exact a_kernel_without_filters_is_named_with_what_it_lacks"),
        ),
        ("kernel", Vec::new()),
        (
            "e2e_netcat",
            words("--exact mirror::echo_survives_kill_of_the_primary"),
        ),
        (
            "e2e_adoption",
            words("--exact mirror::idle_connections_are_adopted"),
        ),
    ]
}

/// The executables of the `tests` package, by name, built.
fn test_binaries() -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = cargo();
    cargo
        .args(["test", "--release", "--package", "tests", "--no-run"])
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    let output = cargo
        .output()
        .with_context(|| format!("cannot start `{}`", describe(&cargo)))?;
    ensure!(
        output.status.success(),
        "`{}`: {}",
        describe(&cargo),
        output.status
    );
    let messages = String::from_utf8_lossy(&output.stdout);
    let binaries = messages.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        if message["target"]["kind"][0] != "test" {
            return None;
        }
        let name = message["target"]["name"].as_str()?.to_owned();
        Some((name, message["executable"].as_str()?.into()))
    });
    Ok(binaries.collect())
}

/// A kernel of Debian's, unpacked.
struct Kernel {
    /// What `uname -r` will say.
    release: String,
    /// Where its package was unpacked.
    directory: PathBuf,
}

impl Kernel {
    /// Downloads the newest one of a series unless it is there. The cloud variant: it is small, and
    /// the programs run in code that all variants share.
    fn fetch(series: &str) -> Result<Self> {
        let known = RELEASES.iter().find(|(known, _)| *known == series);
        let Some((_, suite)) = known else {
            let known = RELEASES.map(|(known, _)| known).join(", ");
            bail!("kernel {series} is not known; expected one of {known}");
        };
        let kernels = workspace().join("target/kernels");
        let directory = kernels.join(series);
        let image = directory.join("boot");
        if let Some(release) = release_in(&image) {
            return Ok(Self { release, directory });
        }
        // Under another name until it is whole: a download that was interrupted is begun anew.
        let part = kernels.join(format!("{series}.part"));
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        let apt = Apt::new(&part.join("apt"), suite)?;
        let package = apt.newest(&format!("linux-image-{series}."), "-cloud-amd64")?;
        println!("kernel: {package}");
        run_quietly(apt.command("apt-get").args(["download", &package]))?;
        unpack(&apt.downloaded()?, &part)?;
        fs::rename(&part, &directory)?;
        let release = release_in(&image).context("no kernel in its directory")?;
        Ok(Self { release, directory })
    }

    fn is_too_old(&self) -> bool {
        numbers(&self.release)[..] < OLDEST[..]
    }

    /// Boots with this root and passes on what the machine prints, until it ends.
    fn boot(&self, root: &Path) -> Result<()> {
        let result = self.directory.join("result");
        fs::write(&result, "")?;
        println!("kernel: booting {}", self.release);
        let begin = Instant::now();
        let status = command("timeout")
            .args(["--foreground", LIMIT, "qemu-system-x86_64"])
            // Emulated, and so the same everywhere: nested virtualisation is rarely there or sound.
            .args(["-machine", "pc,accel=tcg", "-cpu", "max"])
            .args(["-smp", "2", "-m", "2G", "-nodefaults", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio", "-serial"])
            .arg(format!("file:{}", result.display()))
            .arg("-kernel")
            .arg(
                self.directory
                    .join(format!("boot/vmlinuz-{}", self.release)),
            )
            .arg("-initrd")
            .arg(root)
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .stdin(Stdio::null())
            .status()
            .context("cannot start qemu")?;
        match fs::read_to_string(&result)?.trim() {
            "passed" => {
                let seconds = begin.elapsed().as_secs();
                println!("kernel: the tests pass on {} ({seconds} s)", self.release);
                Ok(())
            }
            "failed" => bail!("tests fail on {}", self.release),
            _ => bail!(
                "the machine ended without a result ({status}; 124 is its limit of {LIMIT} s)"
            ),
        }
    }
}

/// Unpacks a kernel's package and prepares it as its installation would.
fn unpack(archive: &Path, into: &Path) -> Result<()> {
    run_quietly(command("dpkg").arg("-x").arg(archive).arg(into))?;
    if !into.join("lib").exists() {
        // Debian 13 and later have it in /usr only.
        std::os::unix::fs::symlink("usr/lib", into.join("lib"))?;
    }
    // busybox reads plain modules only.
    let plain = ["-name", "*.ko.xz", "-exec", "xz", "--decompress", "{}", "+"];
    run_quietly(command("find").arg(into.join("lib/modules/")).args(plain))?;
    let release = release_in(&into.join("boot")).context("no boot/vmlinuz-* in the package")?;
    run_quietly(
        command("busybox")
            .args(["depmod", "-b"])
            .arg(into)
            .arg(release),
    )
}

/// `uname -r` of the kernel in a `/boot`.
fn release_in(boot: &Path) -> Option<String> {
    fs::read_dir(boot).ok()?.find_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        Some(name.strip_prefix("vmlinuz-")?.to_owned())
    })
}

/// The numbers in a version, for comparison.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// The name with the greatest version between `prefix` and `suffix`.
fn newest(names: &str, prefix: &str, suffix: &str) -> Option<String> {
    names
        .lines()
        .filter_map(|name| Some((name, name.strip_prefix(prefix)?.strip_suffix(suffix)?)))
        .max_by_key(|(_, version)| numbers(version))
        .map(|(name, _)| name.to_owned())
}

/// apt with lists and sources of its own: the host's stay as they are, and any release is in reach.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path, suite: &str) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let source =
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org";
        let sources = format!(
            "{source}/debian {suite} main\n{source}/debian-security {suite}-security main\n"
        );
        fs::write(directory.join("sources.list"), sources)?;
        let apt = Self {
            directory: directory.to_owned(),
        };
        println!(
            "kernel: apt-get update ({suite}, in {})",
            directory.display()
        );
        run_quietly(apt.command("apt-get").arg("update"))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> std::process::Command {
        let mut command = command(program);
        let at =
            |option: &str, path: &str| format!("{option}={}", self.directory.join(path).display());
        command.current_dir(&self.directory);
        for option in [
            at("Dir::Etc::sourcelist", "sources.list"),
            at("Dir::State::lists", "lists"),
            at("Dir::Cache", "cache"),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Acquire::Languages=none".into(),
            "APT::Architecture=amd64".into(),
            // The directories are ours and not `_apt`'s.
            "APT::Sandbox::User=".into(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    /// The package with the greatest version in its name between `prefix` and `suffix`.
    fn newest(&self, prefix: &str, suffix: &str) -> Result<String> {
        let names = ask(self.command("apt-cache").args(["pkgnames", prefix]));
        let names = names.context("apt-cache pkgnames")?;
        newest(&names, prefix, suffix)
            .with_context(|| format!("apt knows no package {prefix}*{suffix}"))
    }

    /// The one archive that was downloaded.
    fn downloaded(&self) -> Result<PathBuf> {
        fs::read_dir(&self.directory)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt-get download left no archive")
    }
}

/// The machine's root directory, to be.
struct Root {
    directory: PathBuf,
}

impl Root {
    fn new(directory: PathBuf) -> Result<Self> {
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        for path in [
            "bin", "etc", "usr/bin", "proc", "sys", "dev", "run", "tmp", "root",
        ] {
            fs::create_dir_all(directory.join(path))?;
        }
        Ok(Self { directory })
    }

    /// Busybox, and the programs that the tests run.
    fn add_programs(&self) -> Result<()> {
        let busybox = find("busybox").context("busybox")?;
        self.add_file(&busybox, "/bin/busybox")?;
        self.add_libraries(&busybox)?;
        for (program, _) in PROGRAMS {
            if program == "cc" {
                continue;
            }
            let path = find(program).with_context(|| format!("{program} is not installed"))?;
            self.add_program(program, &path)?;
        }
        std::os::unix::fs::symlink("nc.openbsd", self.directory.join("usr/bin/nc"))?;
        Ok(())
    }

    fn add_program(&self, name: &str, path: &Path) -> Result<()> {
        self.add_file(path, &format!("/usr/bin/{name}"))?;
        self.add_libraries(path)
    }

    fn add_libraries(&self, program: &Path) -> Result<()> {
        // Fails for a static program, which needs none.
        let listed = ask(command("ldd").arg(program)).unwrap_or_default();
        for line in listed.lines() {
            if let Some(library) = line.split_whitespace().find(|word| word.starts_with('/'))
                && !self.place(library).exists()
            {
                self.add_file(Path::new(library), library)?;
            }
        }
        Ok(())
    }

    /// Networking's modules and what they depend on. The kernel asks for each by itself.
    fn add_modules(&self, kernel: &Kernel) -> Result<()> {
        let modules = Path::new("lib/modules").join(&kernel.release);
        let (from, to) = (
            kernel.directory.join(&modules),
            self.directory.join(&modules),
        );
        fs::create_dir_all(to.join("kernel/drivers"))?;
        for part in [
            "kernel/net",
            "kernel/lib",
            "kernel/crypto",
            "kernel/drivers/net",
        ] {
            let part_from = from.join(part);
            let into = to.join(part);
            let into = into.parent().unwrap_or(&to);
            run_quietly(command("cp").arg("-a").arg(part_from).arg(into))?;
        }
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    fn add_init(&self, tests: &str) -> Result<()> {
        let path = self.directory.join("init");
        let text = format!(
            "#!/bin/busybox sh\n\
             /bin/busybox --install -s /bin\n\
             export PATH=/usr/bin:/bin HOME=/root\n\
             export RFSIS_AGENT=/usr/bin/rfsis-agent RFSIS_TEST_SLOW={SLOWNESS}\n\
             mount -t proc proc /proc\n\
             mount -t sysfs sys /sys\n\
             mount -t devtmpfs dev /dev\n\
             mount -t tmpfs tmp /tmp\n\
             mount -t tmpfs run /run\n\
             mount -t bpf bpf /sys/fs/bpf\n\
             echo /bin/modprobe > /proc/sys/kernel/modprobe\n\
             ip link set lo up\n\
             result=passed\n\
             {tests}\
             echo $result > /dev/ttyS1\n\
             reboot -f\n"
        );
        fs::write(&path, text)?;
        run_quietly(command("chmod").arg("755").arg(&path))
    }

    /// The archive that the kernel unpacks.
    fn pack(&self) -> Result<PathBuf> {
        let archive = self.directory.with_extension("cpio");
        let line = "find . | cpio --quiet --create --format=newc --owner=0:0 --file";
        run_quietly(
            command("sh")
                .args(["-c", &format!("{line} \"$0\"")])
                .arg(&archive)
                .current_dir(&self.directory),
        )?;
        Ok(archive)
    }

    fn add_file(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.place(to);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::copy(from, &to).with_context(|| format!("copying {}", from.display()))?;
        Ok(())
    }

    fn place(&self, path: &str) -> PathBuf {
        self.directory.join(path.trim_start_matches('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_kernel_goes_by_numbers_and_is_no_other_flavour() {
        let names = "linux-image-6.1.0-9-cloud-amd64\n\
                     linux-image-6.1.0-56-cloud-amd64\n\
                     linux-image-6.1.0-57-amd64\n\
                     linux-image-6.1.0-58-cloud-amd64-dbg\n\
                     linux-image-6.1.0-59-cloud-amd64-unsigned\n\
                     linux-image-6.12.1-cloud-amd64\n";
        let newest =
            |series: &str| newest(names, &format!("linux-image-{series}."), "-cloud-amd64");
        assert_eq!(
            newest("6.1").as_deref(),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(newest("5.10"), None);
    }

    #[test]
    fn a_kernel_before_the_oldest_is_too_old() {
        let too_old = |release: &str| {
            let (release, directory) = (release.to_owned(), PathBuf::new());
            Kernel { release, directory }.is_too_old()
        };
        assert!(too_old("5.10.0-46-cloud-amd64") && too_old("5.17.0-1-cloud-amd64"));
        assert!(!too_old("5.18.0-1-cloud-amd64") && !too_old("6.1.0-56-cloud-amd64"));
    }
}
