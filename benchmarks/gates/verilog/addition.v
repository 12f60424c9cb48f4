// Sum of two numbers, as in a residual connection.
module addition #(
    parameter S = 24
) (
    input [S-1:0] a,
    input [S-1:0] b,
    output [S-1:0] sum
);
  assign sum = a + b;
endmodule
