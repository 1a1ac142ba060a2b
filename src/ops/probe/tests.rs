//! Tests the readers on files from other machines, and the advice for machines that are not at
//! hand.

use super::machine::{chosen, count};
use super::mounts::mount_of;
use super::*;
use crate::io::{BlockDevice, FlushMethod, UnavailableReason, UringUnavailable};
use std::fs;

const RING: AutoDriver = AutoDriver { name: super::driver::RING, because: None };

/// A machine that leaves nothing to be desired: an NVMe device with polling queues, and all limits
/// lifted.
fn best() -> Machine {
    Machine {
        kernel: Kernel { release: "6.12.0".into(), refused: None },
        io_uring: IoUring::new(None, Some(0), false),
        memory: AvailableMemory {
            total_bytes: Some(64 << 30),
            available_bytes: Some(60 << 30),
            ..Default::default()
        },
        memory_locks: MemoryLocks::new(None, None, true),
        directory: Directory {
            path: "/srv/store".into(),
            looked_at: "/srv/store".into(),
            unwritable: None,
            file_system: Some("xfs".into()),
            free_bytes: Some(1 << 40),
            holds_store: false,
            direct_io: DirectIo::Works,
            device: Some(BlockDevice {
                name: "nvme0n1".into(),
                number: "259:0".into(),
                nvme: true,
                write_cache: Some("write through".into()),
                io_poll: Some(true),
                rotational: Some(false),
                ..BlockDevice::default()
            }),
            flush: Some(FlushMethod::Dsync),
        },
        huge_pages: HugePages {
            reserved_count: Some(512),
            free_count: Some(512),
            transparent: Some("madvise".into()),
        },
        cores: Cores {
            online_count: Some(4),
            allowed: (0..4).collect(),
            physical_count: Some(4),
            quota_count: None,
        },
        checksum: "crc instruction".into(),
        open_files: OpenFiles {
            limit_count: Some(65536),
            hard_limit_count: None,
            file_bytes_max: None,
        },
    }
}

fn refuse(machine: &mut Machine, refusal: UnavailableReason, error: &str) {
    machine.io_uring = IoUring::new(
        Some(UringUnavailable { reason: refusal, error: error.into() }),
        Some(0),
        false,
    );
}

/// The subjects that the advice does not find good, and all its commands.
fn complaints(machine: &Machine, driver: &AutoDriver) -> (Vec<&'static str>, Vec<String>) {
    let findings = machine.advice_with(driver);
    let subjects = findings
        .iter()
        .filter(|finding| finding.level > Level::Good)
        .map(|finding| finding.subject);
    let commands = findings
        .iter()
        .flat_map(|finding| finding.suggestions.iter().filter_map(|better| better.command.clone()));
    (subjects.collect(), commands.collect())
}

/// An administrator who has followed all advice must not be asked for more.
#[test]
fn a_machine_as_it_should_be_gets_no_advice() {
    assert_eq!(complaints(&best(), &RING), (vec![], vec![]));
    assert!(best().can_run());
}

#[test]
fn each_refusal_names_its_reason_and_its_remedy_and_stops_nobody() {
    use UnavailableReason::*;
    let cases = [
        (Kernel, "ENOSYS", "too old a one (ENOSYS)", None),
        (Seccomp, "EPERM", "a seccomp filter forbids io_uring (EPERM)", Some("seccomp=PROFILE")),
        (Setting, "EPERM", "kernel.io_uring_disabled", Some("sysctl kernel.io_uring_disabled=0")),
        (MemoryLocks, "ENOMEM", "locked memory", Some("ulimit -l unlimited")),
        (OpenFiles, "EMFILE", "open files", Some("ulimit -n")),
        (Policy, "EACCES", "policy", None),
        (Other, "EINVAL", "EINVAL", None),
    ];
    for (refusal, error, reason, remedy) in cases {
        let mut machine = best();
        refuse(&mut machine, refusal, error);
        let driver = machine.driver();
        assert!(driver.to_string().starts_with("portable, because "), "{driver}");
        assert!(driver.to_string().contains(reason), "{driver} does not say {reason}");
        let (subjects, commands) = complaints(&machine, &driver);
        assert_eq!(subjects, ["io_uring"], "{refusal:?}");
        assert_eq!(commands.is_empty(), remedy.is_none(), "{commands:?}");
        assert!(remedy.is_none_or(|remedy| commands[0].contains(remedy)), "{commands:?}");
        assert!(machine.can_run(), "the portable driver is there for this");
    }
}

#[test]
fn what_only_costs_speed_is_improvable_and_what_stops_a_store_is_fatal() {
    let check = |change: &dyn Fn(&mut Machine), wanted: &[&str], can_run: bool, hint: &str| {
        let mut machine = best();
        change(&mut machine);
        let (subjects, commands) = complaints(&machine, &RING);
        assert_eq!((&subjects[..], machine.can_run()), (wanted, can_run));
        assert!(
            commands.iter().any(|command| command.contains(hint)) || hint.is_empty(),
            "{commands:?}: {hint}"
        );
        assert!(
            commands.iter().all(|command| !command.contains('\n')),
            "commands are copied line by line"
        );
    };
    check(&|m| m.directory.direct_io = DirectIo::Refused, &["direct I/O"], true, "--dir");
    check(&|m| m.directory.file_system = Some("tmpfs".into()), &["file system"], true, "");
    check(&|m| m.directory.file_system = Some("btrfs".into()), &["file system"], true, "chattr +C");
    // A new store on four shards takes 386 MiB; an existing one takes no more.
    check(&|m| m.directory.free_bytes = Some(350 << 20), &["file system"], false, "--shards 1");
    check(&|m| m.directory.free_bytes = Some(400 << 20), &[], true, "");
    let there =
        |m: &mut Machine| (m.directory.free_bytes, m.directory.holds_store) = (Some(1 << 20), true);
    check(&there, &[], true, "");
    check(&|m| m.open_files.file_bytes_max = Some(64 << 20), &["file system"], false, "ulimit -f");
    check(
        &|m| m.directory.device.as_mut().unwrap().io_poll = Some(false),
        &["device polling"],
        true,
        "poll_queues=4",
    );
    check(
        &|m| m.directory.device.as_mut().unwrap().rotational = Some(true),
        &["block device"],
        true,
        "",
    );
    check(
        &|m| m.memory_locks = MemoryLocks::new(Some(64 << 10), None, true),
        &["locked memory"],
        true,
        "ulimit -l",
    );
    check(&|m| m.cores.quota_count = Some(2), &["processors"], true, "--cpuset-cpus 0-1");
    check(&|m| m.checksum = "tables".into(), &["checksums"], true, "");
    check(&|m| m.open_files.limit_count = Some(256), &["open files"], true, "ulimit -n");
    // Four shards have 56 files open, and the server some others.
    check(&|m| m.open_files.limit_count = Some(70), &["open files"], false, "ulimit -n");
    check(&|m| m.kernel.refused = Some("too old".into()), &["kernel"], false, "");
    let never = HugePages {
        reserved_count: Some(0),
        free_count: Some(0),
        transparent: Some("never".into()),
    };
    check(&|m| m.huge_pages = never.clone(), &["huge pages"], true, "vm.nr_hugepages=128");
    let unwritable = |m: &mut Machine| {
        m.directory.unwritable = Some("read-only".into());
        m.directory.direct_io = DirectIo::Unknown;
    };
    check(&unwritable, &["file system", "direct I/O"], false, "--dir");
    // None of these leads to a suggestion.
    check(&|m| m.huge_pages.free_count = Some(0), &[], true, "");
    check(&|m| m.directory.device = None, &[], true, "");
    check(
        &|m| m.directory.device.as_mut().unwrap().write_cache = Some("write back".into()),
        &[],
        true,
        "",
    );
}

/// An executor that the limit does not allow panics; one executor too few leaves a core idle.
#[test]
fn locked_memory_is_counted_in_executors_and_buffers() {
    let locks = |bytes, enforced| MemoryLocks::new(Some(bytes), Some(bytes), enforced);
    let executors = |bytes, enforced| locks(bytes, enforced).executors_max;
    assert_eq!(executors(8 << 20, true), Some(14));
    assert_eq!(executors(576 << 10, true), Some(1));
    assert_eq!(executors(64 << 10, true), Some(0));
    assert_eq!(executors(64 << 10, false), Some(0), "glommio checks the limit, enforced or not");
    assert_eq!(executors(8 << 20, false), None);
    assert_eq!(MemoryLocks::new(None, None, true).executors_max, None);
    assert_eq!(locks(8 << 20, true).buffer_bytes(2), Some(4 << 20));
    assert_eq!(locks(2 << 20, true).buffer_bytes(2), Some((2 << 20) - (2 * (576 << 10))));
    assert_eq!(locks(64 << 10, true).buffer_bytes(2), Some(0));
    assert_eq!(locks(64 << 10, false).buffer_bytes(2), None);
}

#[test]
fn texts_of_the_kernel_are_read_as_they_are_meant() {
    assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
    assert_eq!(chosen("always"), None);
    assert_eq!(
        (count("0-3,8"), count("0"), count("0-"), count("")),
        (Some(5), Some(1), None, None)
    );
}

#[test]
fn the_deepest_and_latest_mount_over_a_path_is_its_own() {
    let mountinfo = "\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:28 /@home /home rw - btrfs /dev/vdb rw,subvol=/@home
31 22 0:40 / /mnt/a\\040b rw,relatime - xfs /dev/loop0 rw
32 31 0:41 / /mnt/a\\040b rw - tmpfs none rw
nonsense";
    let on = |path: &str| {
        mount_of(mountinfo, Path::new(path)).map(|mount| (mount.file_system, mount.source))
    };
    assert_eq!(on("/srv"), Some(("ext4".into(), "/dev/vda1".into())));
    assert_eq!(on("/home/user"), Some(("btrfs".into(), "/dev/vdb".into())));
    assert_eq!(
        on("/homes"),
        Some(("ext4".into(), "/dev/vda1".into())),
        "/homes is not below /home"
    );
    assert_eq!(on("/mnt/a b/c"), Some(("tmpfs".into(), "none".into())));
    assert_eq!(mount_of("", Path::new("/")), None);
}

#[test]
fn looking_at_a_directory_that_is_not_there_asks_its_parent_and_leaves_nothing() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let machine = Machine::look(&dir.path().join("a/b"));
    assert_eq!(machine.directory.looked_at, dir.path());
    assert_ne!(machine.directory.direct_io, DirectIo::Unknown);
    assert!(machine.can_run(), "{:?}", machine.advice());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert_eq!(Machine::look(Path::new("no-such-directory/x")).directory.looked_at, Path::new("."));
}

/// Root may write anywhere, so the only path that certainly can't be written is one that is not a
/// directory.
#[test]
fn a_directory_below_a_file_is_no_place_for_a_store() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let machine = Machine::look(&file.path().join("store"));
    assert!(!machine.can_run());
    assert!(machine.directory.unwritable.unwrap().contains("not a directory"));
}

/// The quota on a machine whose control groups have these files.
fn quota(membership: &str, mountinfo: &str, files: &[(&str, &str)]) -> Option<u64> {
    super::cgroup::quota_millis(membership, mountinfo, |path| {
        let found = files.iter().find(|(name, _)| Path::new(name) == path);
        found.map(|(_, text)| (*text).to_owned())
    })
}

const V2: &str = "30 22 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n31 22 \
                  0:29 / /proc rw - proc proc rw";

/// A container with the time of two processors on a machine of 64 must not be treated as if it had
/// 64.
#[test]
fn the_lowest_limit_of_all_groups_above_a_process_is_its_own() {
    let group = |max| ("/sys/fs/cgroup/a/b/cpu.max", max);
    assert_eq!(quota("0::/a/b", V2, &[group("200000 100000")]), Some(2000));
    assert_eq!(quota("0::/a/b", V2, &[group("150000 100000")]), Some(1500));
    assert_eq!(quota("0::/a/b", V2, &[group("max 100000")]), None);
    let parents = [group("max 100000"), ("/sys/fs/cgroup/a/cpu.max", "50000 100000")];
    assert_eq!(quota("0::/a/b", V2, &parents), Some(500), "the group above");
    let stricter = [group("100000 100000"), ("/sys/fs/cgroup/a/cpu.max", "400000 100000")];
    assert_eq!(quota("0::/a/b", V2, &stricter), Some(1000));
    assert_eq!(
        quota("0::/a/b", V2, &[("/sys/fs/cgroup/a/x/cpu.max", "1 100000")]),
        None,
        "another group"
    );
    // In a container with a view of its own, the limit is at the top of that view.
    assert_eq!(quota("0::/", V2, &[("/sys/fs/cgroup/cpu.max", "300000 100000")]), Some(3000));
}

#[test]
fn control_groups_of_version_1_and_of_containers_are_read_too() {
    let v1 = "25 22 0:20 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n26 22 \
              0:21 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n27 22 0:22 / \
              /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
    let membership = "9:name=systemd:/\n4:cpu,cpuacct:/job\n3:memory:/other\n0::/";
    let limits = |quota| {
        [
            ("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", quota),
            ("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "50000"),
        ]
    };
    assert_eq!(quota(membership, v1, &limits("100000")), Some(2000));
    assert_eq!(quota(membership, v1, &limits("-1")), None);
    // In a Docker container without a view of its own, the container's group is mounted under its
    // full name.
    let docker = "25 22 0:20 /docker/c0ffee /sys/fs/cgroup rw - cgroup2 cgroup rw";
    let files =
        [("/sys/fs/cgroup/cpu.max", "250000 100000"), ("/sys/fs/cgroup/in/cpu.max", "max 100000")];
    assert_eq!(quota("0::/docker/c0ffee", docker, &files), Some(2500));
    assert_eq!(quota("0::/docker/c0ffee/in", docker, &files), Some(2500));
    assert_eq!(quota("0::/elsewhere", docker, &files), Some(2500), "what is mounted can be read");
    assert_eq!(quota("0::/../..", V2, &[("/sys/fs/cgroup/cpu.max", "100000 100000")]), Some(1000));
    for nonsense in ["", "0", "0::", "x:y", "0::/a"] {
        for mounts in ["", "1 2 3", " - cgroup2", V2] {
            assert_eq!(quota(nonsense, mounts, &[("/sys/fs/cgroup/a/cpu.max", "100000 0")]), None);
        }
    }
}

/// A server in a container with 256 MiB must not believe that it has the 64 GiB of the machine
/// around it, and be killed.
#[test]
fn the_lowest_memory_limit_of_all_groups_above_a_process_is_its_own() {
    let limit = |membership: &str, mountinfo: &str, files: &[(&str, &str)]| {
        super::cgroup::memory_bytes(membership, mountinfo, |path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| (*text).to_owned())
        })
    };
    let (max, high) = ("/sys/fs/cgroup/a/memory.max", "/sys/fs/cgroup/a/memory.high");
    assert_eq!(
        limit("0::/a/b", V2, &[(max, "268435456\n")]),
        Some(256 << 20),
        "of the group above"
    );
    assert_eq!(limit("0::/a", V2, &[(max, "268435456"), (high, "1048576")]), Some(1 << 20));
    assert_eq!(limit("0::/a", V2, &[(max, "max"), (high, "max")]), None);
    let v1 = "25 22 0:20 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory";
    let file = |bytes| [("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", bytes)];
    assert_eq!(limit("4:cpu:/x\n3:memory:/job", v1, &file("67108864")), Some(64 << 20));
    assert_eq!(
        limit("3:memory:/job", v1, &file("9223372036854771712")),
        None,
        "that is how version 1 says none"
    );
}

/// The real machine's memory must be found, and an amount that it does not have must be refused.
#[test]
fn this_machine_says_how_much_memory_it_has_left() {
    let memory = AvailableMemory::look();
    let most = memory.most().expect("Linux says");
    assert!(
        memory.available_bytes <= memory.total_bytes.map(|bytes| bytes + (1 << 40)) && most.0 > 0,
        "{memory:?}"
    );
    assert_eq!(memory.judge(1), Room::Enough);
    assert!(matches!(memory.judge(u64::MAX), Room::Lacking(_)));
    assert!(matches!(memory.judge(most.0), Room::Tight(_)));
}
