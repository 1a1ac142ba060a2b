//! A block device as the kernel describes it in /sys: its cache, its guarantees, and the devices
//! below it.
//!
//! 1. A property that the kernel does not report is absent, never guessed.
//!
//! It does *not* query the device itself, and draws no conclusions.

use std::fs;
use std::path::Path;

/// A block device, as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct BlockDevice {
    /// The name of the whole device: `vda`, `nvme0n1`.
    pub name: String,
    /// Major and minor number, as in `/sys/dev/block`; those of the partition, if it is one.
    pub number: String,
    /// The partition that was looked up, if it is one.
    pub partition: Option<String>,
    /// The devices or the file below it, for a mapping, an array or a loop device.
    pub on: Vec<String>,
    /// Whether it is an NVMe device.
    pub nvme: bool,
    /// `write back` if it has a cache that a flush must empty, `write through` if a completed write
    /// is durable.
    pub write_cache: Option<String>,
    /// Whether it can make a single write durable.
    pub fua: Option<bool>,
    /// Whether completions can be polled.
    pub io_poll: Option<bool>,
    /// Whether it is a rotating disk; absent for virtual disks, which the kernel always reports as
    /// rotating.
    pub rotational: Option<bool>,
    /// The smallest transfer.
    pub logical_block_bytes: Option<u32>,
    /// The smallest write that needs no read first.
    pub physical_block_bytes: Option<u32>,
}

impl BlockDevice {
    /// Describes the device with the number `dev` from `sys`, which is `/sys`; `None` if it is not
    /// a block device (tmpfs, btrfs, network file systems).
    pub(crate) fn look(sys: &Path, dev: u64) -> Option<BlockDevice> {
        let number = format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
        let own = sys.join("dev/block").join(&number).canonicalize().ok()?;
        let name_of =
            |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let is_partition = own.join("partition").exists();
        let whole = if is_partition { own.parent()?.to_owned() } else { own.clone() };
        let name = name_of(&whole)?;
        let queue = |field: &str| text(&whole.join("queue").join(field));
        let flag = |field: &str| queue(field).map(|text| text != "0");
        let number_of = |field: &str| queue(field)?.parse().ok();
        let mut on: Vec<String> = fs::read_dir(whole.join("slaves"))
            .map(|list| {
                list.filter_map(|entry| {
                    Some(entry.ok()?.file_name().to_string_lossy().into_owned())
                })
                .collect()
            })
            .unwrap_or_default();
        on.sort();
        on.extend(text(&whole.join("loop/backing_file")));
        Some(BlockDevice {
            number,
            partition: if is_partition { name_of(&own) } else { None },
            on,
            nvme: name.starts_with("nvme"),
            write_cache: queue("write_cache"),
            fua: flag("fua"),
            io_poll: flag("io_poll"),
            rotational: flag("rotational")
                .filter(|_| !name.starts_with("vd") && !name.starts_with("xvd")),
            logical_block_bytes: number_of("logical_block_size"),
            physical_block_bytes: number_of("physical_block_size"),
            name,
        })
    }
}

fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a tree as in /sys: the device at `path`, with these files.
    fn device_tree(sys: &Path, number: &str, path: &str, files: &[(&str, &str)]) {
        let device = sys.join("devices").join(path);
        for (file, text) in files {
            let file = device.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, format!("{text}\n")).unwrap();
        }
        fs::create_dir_all(sys.join("dev/block")).unwrap();
        std::os::unix::fs::symlink(&device, sys.join("dev/block").join(number)).unwrap();
    }

    /// A partition has no queue of its own: read from there, every device would seem to have no
    /// write cache.
    #[test]
    fn a_partition_is_judged_by_its_device_and_a_mapping_names_what_is_under_it() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path();
        let queue =
            [("queue/write_cache", "write back"), ("queue/fua", "1"), ("queue/rotational", "0")];
        let sizes = [
            ("queue/logical_block_size", "512"),
            ("queue/physical_block_size", "4096"),
            ("queue/io_poll", "1"),
        ];
        device_tree(sys, "259:0", "pci/nvme0n1", &[queue, sizes].concat());
        device_tree(sys, "259:1", "pci/nvme0n1/nvme0n1p1", &[("partition", "1")]);
        device_tree(
            sys,
            "252:0",
            "virtual/dm-0",
            &[("slaves/nvme0n1p1/x", ""), ("queue/write_cache", "none")],
        );
        device_tree(sys, "7:0", "virtual/loop0", &[("loop/backing_file", "/srv/image")]);
        device_tree(sys, "254:0", "virtio/vda", &[("queue/rotational", "1")]);
        let look = |major, minor| BlockDevice::look(sys, rustix::fs::makedev(major, minor));
        let whole = look(259, 0).unwrap();
        assert_eq!(
            (whole.nvme, whole.fua, whole.io_poll, whole.rotational),
            (true, Some(true), Some(true), Some(false))
        );
        assert_eq!(
            (whole.logical_block_bytes, whole.physical_block_bytes),
            (Some(512), Some(4096))
        );
        assert_eq!(whole.write_cache.as_deref(), Some("write back"));
        let partition = look(259, 1).unwrap();
        assert_eq!(partition.partition.as_deref(), Some("nvme0n1p1"));
        assert_eq!(BlockDevice { number: "259:0".into(), partition: None, ..partition }, whole);
        assert_eq!(look(252, 0).unwrap().on, ["nvme0n1p1"]);
        assert_eq!(look(7, 0).unwrap().on, ["/srv/image"]);
        assert_eq!(
            look(254, 0).unwrap().rotational,
            None,
            "a virtual disk is not taken for a rotating one"
        );
        assert_eq!(look(0, 40), None);
    }
}
