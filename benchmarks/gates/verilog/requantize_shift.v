// Requantization of a sum to a byte by a shift: min(max(offset - sum, 0) >> shift, 255).
module requantize_shift #(
    parameter S = 24  // bits of the sum
) (
    input signed [S-1:0] sum,
    input signed [S-1:0] offset,
    input [4:0] shift,
    output [7:0] q
);
  wire signed [S:0] moved = offset - sum;
  wire [S-1:0] shifted = (moved < 0 ? 0 : moved) >> shift;
  assign q = shifted > 255 ? 255 : shifted;
endmodule
