#!/bin/busybox sh
# L1's initramfs: load what its root disk needs, and go there.
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
while read -r module; do insmod "$module" || echo "lab: insmod $module failed"; done < /modules/order
tries=0
while [ ! -e /dev/vda ] && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
mkdir -p /root
mount -t ext4 -o noatime /dev/vda /root || { echo "lab: no root disk"; poweroff -f; }
umount /proc
mount -o move /dev /root/dev
exec switch_root /root /init
