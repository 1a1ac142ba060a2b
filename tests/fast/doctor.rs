//! `corepage doctor`: true facts, in lines that fit, with an exit code that a script can use, and
//! nothing left behind.
//!
//! If these fail, an operator is told to change what is not the cause, or is told that all is well.

// Real processes take real time.
#![allow(clippy::disallowed_methods)]

use crate::common;
use common::surroundings::{Mounted, NO_RING, OLD_KERNEL, Without, start_without};
use common::{Served, corepage, scratch, snapshot};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::Command;

fn doctor(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = corepage(&["doctor", "--dir"]);
    command.arg(dir).args(arguments);
    command
}

/// Exit code and stdout.
#[track_caller]
fn says(command: &mut Command) -> (i32, String) {
    let output = command.output().expect("corepage starts");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    (output.status.code().expect("an exit code"), String::from_utf8(output.stdout).expect("text"))
}

/// The JSON form, in surroundings without these.
fn facts(without: &[Without], dir: &Path) -> (i32, Value) {
    let (code, text) = says(start_without(&mut doctor(dir, &["--format", "json"]), without));
    (code, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
}

/// All keys, as `a.b`; those of lists once.
fn keys(value: &Value, path: &str, all: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, value)| keys(value, &format!("{path}.{key}"), all))
        }
        Value::Array(list) => {
            list.first().into_iter().for_each(|value| keys(value, &format!("{path}[]"), all))
        }
        _ => all.push(path.trim_start_matches('.').to_owned()),
    }
}

/// The commands that are offered for a subject.
fn commands(facts: &Value, subject: &str) -> Vec<String> {
    let findings = facts["findings"].as_array().expect("findings");
    let finding = findings
        .iter()
        .find(|finding| finding["subject"] == subject)
        .expect("the subject is there");
    let better = finding["better"].as_array().expect("a list");
    better.iter().filter_map(|better| better["command"].as_str().map(str::to_owned)).collect()
}

#[test]
fn every_line_fits_the_terminal_but_commands_which_are_copied_whole() {
    let dir = scratch("doctor");
    // With as much advice as can be had.
    let without = [NO_RING, Without::DirectIo, Without::FilesAbove(256)];
    for columns in [40, 60, 80, 100] {
        let mut command = doctor(dir.path(), &[]);
        let (code, text) =
            says(start_without(command.env("COLUMNS", columns.to_string()), &without));
        assert_eq!(code, 0, "{text}");
        for line in text
            .lines()
            .filter(|line| !line.starts_with("      ") && !line.starts_with("corepage "))
        {
            assert!(
                line.chars().count() <= columns,
                "{columns} columns, {}: {line}",
                line.chars().count()
            );
        }
        for command in ["docker run --security-opt seccomp=PROFILE.json IMAGE", "ulimit -n 65536"] {
            assert!(
                text.lines().any(|line| line.trim() == command),
                "{command} is not on a line of its own:\n{text}"
            );
        }
        for subject in
            ["kernel", "io_uring", "locked memory", "file system", "direct I/O", "block device"]
        {
            assert!(text.contains(subject), "{subject} is missing:\n{text}");
        }
        // Without line breaks, wherever they fell.
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            words.contains("portable, because a seccomp filter forbids io_uring (EPERM)"),
            "{text}"
        );
    }
}

/// Scripts read these; a key that goes away breaks them.
#[test]
fn the_keys_of_the_json_form_stay() {
    let dir = scratch("doctor-json");
    let (code, facts) = facts(&[Without::FilesAbove(256)], dir.path());
    assert_eq!((code, &facts["can_run"]), (0, &Value::Bool(true)));
    let mut all = Vec::new();
    keys(&facts, "", &mut all);
    let device = all.iter().position(|key| key.starts_with("machine.directory.device"));
    all.retain(|key| !key.starts_with("machine.directory.device"));
    assert!(device.is_some());
    all.sort();
    let wanted = "can_run corepage driver.because driver.name findings[].here findings[].level \
         findings[].subject findings[].used machine.checksum machine.cores.allowed[] \
         machine.cores.online_count machine.cores.physical_count machine.cores.quota_count \
         machine.directory.direct_io machine.directory.file_system machine.directory.flush \
         machine.directory.free_bytes machine.directory.holds_store machine.directory.looked_at \
         machine.directory.path machine.directory.unwritable machine.huge_pages.free_count \
         machine.huge_pages.reserved_count machine.huge_pages.transparent \
         machine.io_uring.available machine.io_uring.disabled_setting machine.io_uring.error \
         machine.io_uring.refusal machine.io_uring.seccomp_filter machine.kernel.refused \
         machine.kernel.release machine.memory.available_bytes machine.memory.group_limit_bytes \
         machine.memory.process_limit_bytes machine.memory.total_bytes \
         machine.memory_locks.enforced machine.memory_locks.executors_max \
         machine.memory_locks.hard_limit_bytes machine.memory_locks.limit_bytes \
         machine.open_files.file_bytes_max machine.open_files.hard_limit_count \
         machine.open_files.limit_count";
    assert_eq!(all.join(" "), wanted);
    assert_eq!(commands(&facts, "open files"), ["ulimit -n 65536"]);
}

#[test]
fn a_ring_that_a_filter_forbids_is_seen_by_trying_and_its_reason_is_named() {
    let dir = scratch("doctor-ring");
    let (code, refused) = facts(&[NO_RING], dir.path());
    let ring = &refused["machine"]["io_uring"];
    assert_eq!(
        (code, &ring["available"], &ring["seccomp_filter"]),
        (0, &Value::Bool(false), &Value::Bool(true))
    );
    assert_eq!(
        (&ring["error"], &refused["driver"]["name"]),
        (&Value::from("EPERM"), &Value::from("portable"))
    );
    // Where the whole machine forbids it, too, that is named first.
    if ring["disabled_setting"].as_u64().unwrap_or(0) == 0 {
        assert_eq!(ring["refusal"], "seccomp");
        assert!(commands(&refused, "io_uring")[0].contains("seccomp"), "{refused}");
    }
    let (code, old) = facts(&[OLD_KERNEL], dir.path());
    let ring = &old["machine"]["io_uring"];
    assert_eq!(
        (code, &ring["available"], &ring["error"]),
        (0, &Value::Bool(false), &Value::from("ENOSYS"))
    );
    let (code, unused) = facts(&[Without::RingUse], dir.path());
    let used = &unused["machine"]["io_uring"];
    assert_eq!((code, &used["available"]), (0, &Value::Bool(false)));
    assert_eq!(used["error"], "EPERM when entering a ring");
    // The setting shows that the kernel has io_uring.
    assert_eq!(
        ring["refusal"],
        if ring["disabled_setting"].is_null() { "kernel" } else { "seccomp" }
    );
}

/// A limit that root passes by must not be reported as one that holds, nor the other way round.
#[test]
fn a_limit_of_locked_memory_is_told_from_one_that_does_not_hold() {
    let dir = scratch("doctor-locks");
    let (code, facts_) = facts(&[Without::LocksAbove(64 << 10)], dir.path());
    let locks = &facts_["machine"]["memory_locks"];
    assert_eq!(
        (code, &locks["limit_bytes"], &locks["enforced"]),
        (0, &Value::from(64 << 10), &Value::Bool(true))
    );
    assert_eq!(locks["executors_max"], 0);
    // With no locked memory at all a ring fits, on kernels that do not charge for it, or is refused
    // for that reason.
    let (code, none) = facts(&[Without::LocksAbove(0)], dir.path());
    let ring = &none["machine"]["io_uring"];
    assert_eq!(code, 0);
    if ring["available"] == false && ring["error"] == "ENOMEM" {
        assert_eq!(ring["refusal"], "memory_locks");
        assert_eq!(commands(&none, "io_uring")[0], "ulimit -l unlimited");
    }
}

#[test]
fn a_file_system_that_refuses_direct_io_is_found_out_and_is_good_enough() {
    let dir = scratch("doctor-direct");
    let (code, refused) = facts(&[Without::DirectIo], dir.path());
    assert_eq!((code, &refused["machine"]["directory"]["direct_io"]), (0, &Value::from("refused")));
}

#[test]
fn the_exit_code_says_when_no_store_can_run_and_the_table_says_why() {
    let dir = scratch("doctor-fatal");
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").expect("a file");
    let before = snapshot(dir.path());
    let (code, text) = says(&mut doctor(&file.join("store"), &[]));
    assert_eq!(code, 1);
    assert!(text.contains("✗ file system") && text.contains("can't run here"), "{text}");
    let (code, text) =
        says(start_without(&mut doctor(dir.path(), &[]), &[Without::FilesAbove(32)]));
    assert_eq!(code, 1);
    assert!(text.contains("✗ open files") && text.contains("ulimit -n 65536"), "{text}");
    assert_eq!(
        doctor(dir.path(), &["--format", "xml"]).output().expect("it starts").status.code(),
        Some(2)
    );
    assert_eq!(snapshot(dir.path()), before);
}

/// Whoever asks first and starts then must not hear yes and fail, nor hear no where a start would
/// do.
#[test]
fn doctor_says_no_where_serve_fails_and_yes_where_it_starts() {
    let dir = scratch("doctor-agrees");
    let cases: [(&[Without], &[&str], &str); 4] = [
        (&[Without::FileSizesAbove(1 << 20)], &[], "file system"),
        (&[Without::FilesAbove(23)], &[], "open files"),
        (&[], &["--memory", "100T"], "memory"),
        (&[], &["--memory", "64M"], ""),
    ];
    for (without, arguments, subject) in cases {
        let store = dir.path().join(if subject.is_empty() { "store" } else { "refused" });
        let (code, text) = says(start_without(&mut doctor(&store, arguments), without));
        let fatal = format!("✗ {subject}");
        assert_eq!(
            (code, text.contains("✗")),
            (i32::from(!subject.is_empty()), !subject.is_empty()),
            "{text}"
        );
        assert!(subject.is_empty() || text.contains(&fatal), "{text}");
        let address = format!("unix:{}", dir.path().join("s").display());
        let mut serve = corepage(&["serve", "--nbd", &address, "--dir"]);
        serve.arg(&store).args(arguments);
        if subject.is_empty() {
            assert!(Served::spawn(serve, 1).stop().success());
            continue;
        }
        let output = start_without(&mut serve, without).output().expect("it starts");
        assert_eq!(
            output.status.code(),
            Some(1),
            "{subject}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Room for a new store was not looked at: with 4 MiB left the answer was yes. One that is there
/// needs none.
#[test]
fn a_disk_without_room_for_a_new_store_is_told() {
    let Some(mounted) = Mounted::image("ext4") else { return };
    let free =
        |facts: &Value| facts["machine"]["directory"]["free_bytes"].as_u64().expect("a number");
    let (code, roomy) = facts(&[], mounted.path());
    assert_eq!(code, 0);
    let filled = std::fs::File::create(mounted.path().join("fill")).expect("a file");
    rustix::fs::fallocate(
        &filled,
        rustix::fs::FallocateFlags::empty(),
        0,
        free(&roomy) - (4 << 20),
    )
    .expect("it fits");
    let store = mounted.path().join("store");
    let (code, text) = says(&mut doctor(&store, &[]));
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(code == 1 && words.contains("a new one takes") && words.contains("on one"), "{text}");
    let output = corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--dir"])
        .arg(&store)
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
}

/// In a container without /proc and /sys: what doctor names is the driver that serve takes, and
/// nothing panics.
#[test]
fn doctor_and_serve_name_the_same_driver_where_proc_and_sys_are_hidden() {
    let dir = scratch("doctor-hidden");
    let hide = "mount -t tmpfs none /proc && mount -t tmpfs none /sys && exec \"$@\"";
    let hidden = |command: &Command| {
        let mut within = Command::new("unshare");
        within
            .args(["-m", "sh", "-c", hide, "sh"])
            .arg(command.get_program())
            .args(command.get_args());
        within.env("RUST_LOG", "warn").stdin(std::process::Stdio::null());
        within
    };
    if !hidden(&Command::new("true")).output().is_ok_and(|output| output.status.success()) {
        common::skip("nothing can be mounted here");
        return;
    }
    let (code, text) = says(&mut hidden(&doctor(dir.path(), &["--format", "json"])));
    let told: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(code, 0, "{told}");
    let driver = told["driver"]["name"].as_str().expect("a name").to_owned();
    let mut serve = corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--dir"]);
    serve.arg(dir.path().join("store"));
    let served = Served::spawn(hidden(&serve), 1);
    let line =
        served.lines.iter().find(|line| line.starts_with("store ")).expect("the report").clone();
    assert!(
        line.contains(&format!("; {driver} on")) || line.contains(&format!("; {driver}, ")),
        "{driver}: {line}"
    );
    assert!(!line.contains("executor failed"), "{line}");
    assert!(served.stop().success());
}

#[test]
fn a_look_at_a_store_in_use_disturbs_nobody_and_leaves_nothing() {
    let dir = scratch("doctor-used");
    let store = dir.path().join("a/store");
    let (code, text) = says(&mut doctor(&store, &[]));
    assert!(code == 0 && text.contains("not there yet"), "{text}");
    assert_eq!(snapshot(dir.path()), []);
    let served = Served::start(&store);
    let mut client = served.client();
    client.write(common::nbd::FUA, 0, b"kept");
    let names = || snapshot(&store).into_iter().map(|(path, _)| path).collect::<Vec<_>>();
    let before = names();
    assert_eq!(says(&mut doctor(&store, &[])).0, 0);
    assert_eq!(names(), before);
    assert_eq!(client.read(0, 4), b"kept");
    assert!(served.stop().success());
}

/// btrfs hides its device behind a number of its own: it is found by the mount.
#[test]
fn the_device_behind_a_file_system_is_found_also_where_it_is_hidden() {
    for kind in ["btrfs", "xfs"] {
        let Some(mounted) = Mounted::image(kind) else { continue };
        let (code, facts) = facts(&[], mounted.path());
        let directory = &facts["machine"]["directory"];
        assert_eq!((code, &directory["file_system"]), (0, &Value::from(kind)));
        let device = &directory["device"];
        assert!(device["name"].as_str().is_some_and(|name| name.starts_with("loop")), "{device}");
        assert!(device["on"][0].as_str().is_some_and(|file| file.ends_with("/image")), "{device}");
        assert!(
            device["logical_block_bytes"].as_u64().is_some_and(|bytes| bytes >= 512),
            "{device}"
        );
    }
}

/// A control group with so much processor time, removed at the end. `None`, loudly, where none can
/// be made.
struct TimeGroup(std::path::PathBuf);

impl TimeGroup {
    fn with_percent(percent: u32) -> Option<TimeGroup> {
        // Version 2, or either usual place of version 1.
        let tops = ["/sys/fs/cgroup", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"];
        let group = tops.iter().find_map(|top| {
            let group =
                Path::new(top).join(format!("corepage-test-{}-{percent}", std::process::id()));
            std::fs::create_dir(&group).ok()?;
            let made = TimeGroup(group);
            // The kernel makes these files, where the directory is one of control groups.
            let set = |name: &str, text: String| {
                let file = std::fs::File::options().write(true).open(made.0.join(name));
                file.and_then(|mut file| file.write_all(text.as_bytes())).is_ok()
            };
            let limited = set("cpu.max", format!("{percent}000 100000"))
                || set("cpu.cfs_quota_us", format!("{percent}000"));
            limited.then_some(made)
        });
        if group.is_none() {
            common::skipped("no control group with a limit of processor time can be made here");
        }
        group
    }

    /// `command` in this group.
    fn command(&self, command: &Command) -> Command {
        let mut within = Command::new("sh");
        within.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.0.join("cgroup.procs"));
        within.arg(command.get_program()).args(command.get_args()).env("RUST_LOG", "error");
        within
    }
}

impl Drop for TimeGroup {
    fn drop(&mut self) {
        // Its processes have ended; the kernel may notice a moment later.
        for _ in 0..200 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// A container with the time of one processor must get one shard, whatever the machine has.
#[test]
fn a_limit_of_processor_time_is_seen_and_bounds_the_shards() {
    let dir = scratch("doctor-time");
    let (_, unlimited) = facts(&[], dir.path());
    let allowed = unlimited["machine"]["cores"]["allowed"].as_array().expect("cores").len();
    let Some(group) = TimeGroup::with_percent(90) else { return };
    if allowed < 2 {
        common::skipped("with one processor this limit is none");
        return;
    }
    let (_, text) = says(&mut group.command(&doctor(dir.path(), &["--format", "json"])));
    let limited: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert_eq!(limited["machine"]["cores"]["quota_count"], 1, "{limited}");
    let mut serve = corepage(&["serve", "--nbd", "tcp:127.0.0.1:0", "--dir"]);
    serve.arg(dir.path().join("store"));
    let served = Served::spawn(group.command(&serve), 1);
    let report = served.lines.iter().find(|line| line.starts_with("store ")).expect("a report");
    assert!(report.contains(": 1 shard, not pinned, time for 0.9 processors"), "{report}");
    assert!(served.stop().success());
}
